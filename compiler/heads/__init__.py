"""Fewer KV heads for a model: which of them can be one, how, and what that cost."""
