"""A program bound to memory and kernels: executed, tuned, written down."""
