"""Triton kernels and their launchers; they know tensors and head maps, nothing of models."""
