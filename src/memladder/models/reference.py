"""What a layer should compute: the same Hugging Face module in float32, uncompiled, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from memladder.core.case import Workload
from memladder.models import LayerConfig, layer
from memladder.models.weights import hidden_states


def output(config: LayerConfig, weights_path: Path, shape: Workload, seed: int) -> np.ndarray:
    """float32 [batch_size, seq_len, hidden_size] for the hidden states of the same seed."""
    return _run(config, weights_path, shape, seed, torch.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖, in float64; NaN if either holds one."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def absent(config: LayerConfig, shape: Workload, seed: int, expected: np.ndarray) -> float:
    """The error of no layer at all, which leaves the hidden states as they are: what loses as much
    has nothing of the layer's weights. `expected` is the layer's `output`."""
    return error(hidden_states(config, shape, seed).astype(np.float32), expected)


def rounding(
    config: LayerConfig,
    weights_path: Path,
    shape: Workload,
    seed: int,
    dtype: str,
    expected: np.ndarray,
) -> float:
    """The error of the very layer, uncompiled, when it computes in `dtype`: what can be asked for.

    `expected` is the layer's `output`.

    BLOOM adds ALiBi to the scores in the layer's dtype. The sum reaches slope · seq_len, and from
    2048 on neighbouring float16 numbers are 2 apart (bfloat16: 16), so that at 4096 tokens the
    rounding of the scores alone changes the layer's output by percents. That is the published
    layer's own property; no framework that computes it faithfully can be closer to float32.
    """
    return error(_run(config, weights_path, shape, seed, getattr(torch, dtype)), expected)


def _run(
    config: LayerConfig, weights_path: Path, shape: Workload, seed: int, dtype: torch.dtype
) -> np.ndarray:
    module = layer.load(config, weights_path, shape, dtype, torch.device("cpu"))
    states = torch.from_numpy(hidden_states(config, shape, seed)).to(dtype)
    with torch.inference_mode():
        found: np.ndarray = module(states).float().numpy()
    return found
