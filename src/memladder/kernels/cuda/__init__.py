"""Triton kernels, by the names and with the signatures of their twins in `kernels.naive`.

They run on NVIDIA GPUs, and on the CPU under Triton's interpreter.
"""

from memladder.kernels.cuda.attention import attention
from memladder.kernels.cuda.cached import advance, cache_append, rotary_at
from memladder.kernels.cuda.cached_attention import cached_attention
from memladder.kernels.cuda.ends import add_positions, cap_logits, choose_largest, embed, last_rows
from memladder.kernels.cuda.pointwise import layer_norm_heads, pointwise, rms_norm_heads
from memladder.kernels.cuda.products import glu, matmul, qkv, use_workspace, workspace_bytes
from memladder.kernels.cuda.rows import layer_norm, quantise, rms_norm, rotary
from memladder.kernels.cuda.target import INTERPRETED, has_wgmma
from memladder.kernels.cuda.window import windowed_attention
