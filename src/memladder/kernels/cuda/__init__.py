"""Triton kernels, by the names and with the signatures of their twins in `kernels.naive`.

They run on NVIDIA GPUs, and on the CPU under Triton's interpreter.
"""

from memladder.kernels.cuda.attention import attention
from memladder.kernels.cuda.matmul import matmul
from memladder.kernels.cuda.rows import layer_norm, quantise, rms_norm, rotary
from memladder.kernels.cuda.target import INTERPRETED

__all__ = ["INTERPRETED", "attention", "layer_norm", "matmul", "quantise", "rms_norm", "rotary"]
