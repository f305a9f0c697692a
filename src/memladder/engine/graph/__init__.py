"""A layer's canonical graph, and the same graph as kernels (`fused`).

A layer works on tokens. Every value (`nodes`) is a matrix [tokens, columns], and all but attention
compute each token by itself.
"""
