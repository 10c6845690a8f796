"""Tier 3: old and new timed in turns on one GPU."""
