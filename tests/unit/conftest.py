"""Triton's kernels run here on the CPU, under its interpreter: decided before they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
