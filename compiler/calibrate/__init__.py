"""Calibration: what a model's activations are on text, and codes of weights that fit them."""
