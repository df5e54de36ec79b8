"""The four operations of the decoder: the plain torch form, and faster forms beside it."""
