"""Kernels for CUDA devices, one idea a file, each with a plain torch form beside it.

The modules named ``triton_…`` need Triton, and are imported only where it is there; all others run
on any device. ``TRITON_INTERPRET=1`` runs Triton's on a CPU, which is how they are tested.
"""
