"""Triton's kernels run here on the CPU, under its interpreter: decided before they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
# Tests that run side by side have a core each: decided before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from tests.unit.command import memladder

__all__ = ["memladder"]
