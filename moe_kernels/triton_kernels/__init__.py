"""Triton kernels, one file per operator; imported only where a kernel is about to run."""
