"""Triton kernels of adapters. Imports triton, so it is imported only where triton is (see adapters.ops.triton_ops)."""
