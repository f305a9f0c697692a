"""A canonical graph in, a planned program and its weights out.

fuse (nodes ──▶ kernels with prologues and epilogues) ──▶ program.lower (chunks of tokens)
"""
