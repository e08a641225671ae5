"""Kernels of the base on a GPU, and the tensors laid out for them; each with a plain twin that it is compared with.

They own no request and no cache: tensors in, tensors out. Triton is imported when a kernel is first called, so that all
of it imports without.
"""
