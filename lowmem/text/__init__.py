"""Text to packed batches of token ids, in numpy alone."""
