"""Triton kernels of the base. Imports triton, so it is imported only where a kernel is called."""
