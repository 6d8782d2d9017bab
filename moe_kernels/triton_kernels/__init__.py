"""Triton kernels: plain launchers on tensors, imported only where a GPU operator runs or a test asks."""
