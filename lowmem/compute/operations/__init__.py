"""The decoder's operations: the plain torch form, and faster forms beside it."""
