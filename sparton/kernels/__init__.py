"""Triton kernels of the head and their launchers; imported only when they are called."""
