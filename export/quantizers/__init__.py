"""Weights to codes: each quantizer takes a float32 matrix and gives its format's tensors."""
