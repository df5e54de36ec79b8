"""Weights to codes: each quantizer takes a matrix and gives its format's tensors."""
