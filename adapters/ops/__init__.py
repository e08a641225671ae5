"""The arithmetic of adapters: ``reference``, the plain loop that defines truth, and ``torch_ops``, the fast path.

Pure functions of tensors and plans; they own nothing and know neither modules nor requests.
"""
