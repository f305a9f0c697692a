"""Kernels of the engine, and the layout of the packed weights that they read.

`naive` holds the plain PyTorch twin of every kernel, with the same signature.
"""
