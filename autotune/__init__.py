"""Measurement, search and the statistics of both; knows no kernel."""
