"""Packed batches in, pooled vectors out.

Only this room (and export) imports torch, and only its torch modules do: ``onnx_engine`` must not,
because two thread pools in one process halve each other. So nothing is imported here.
"""
