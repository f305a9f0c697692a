"""The plain PyTorch twin of every kernel: float32 inside, tile by tile, written to be checked.

The imports below are the list of kernels: `kernels.cuda` has each of them, with the signature that
it has here. A program names them (`Step.kernel`).

All activations are matrices [rows, columns], a row a token, float16 or codes of a format. An output
may be the same memory as the operand that its docstring names. Besides their arguments the kernels
need a few tiles of `TILE` elements, never more than 64 MiB, whatever the shapes.
"""

from memladder.kernels.naive.attention import attention, windowed_attention
from memladder.kernels.naive.cached import advance, cache_append, cached_attention, rotary_at
from memladder.kernels.naive.ends import add_positions, cap_logits, choose_largest, embed, last_rows
from memladder.kernels.naive.products import glu, matmul, qkv, use_workspace, workspace_bytes
from memladder.kernels.naive.rows import (
    layer_norm,
    layer_norm_heads,
    pointwise,
    quantise,
    rms_norm,
    rms_norm_heads,
    rotary,
)
