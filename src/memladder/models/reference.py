"""What a layer should compute: the same Hugging Face module in float32, uncompiled, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from memladder.core.case import Workload
from memladder.models import LayerConfig, layer
from memladder.models.weights import hidden_states, sequence_states


def output(
    config: LayerConfig,
    weights_path: Path,
    shape: Workload,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """float32 [batch_size, seq_len, hidden_size] for the hidden states of the same seed.

    With a past, past and new tokens pass at once, and no cache is there.

    In another `dtype` its error is what can be asked for. BLOOM adds ALiBi to the scores in the
    layer's dtype. The sum reaches slope · seq_len, and from 2048 on neighbouring float16 numbers
    are 2 apart (bfloat16: 16), so that at 4096 tokens the rounding of the scores alone changes the
    layer's output by percents. That is the published layer's own property; no framework that
    computes it faithfully can be closer to float32.
    """
    module = layer.load(config, weights_path, uncached(shape), dtype, torch.device("cpu"))
    return of_whole_sequences(module, config, shape, seed, dtype)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖, in float64; NaN if either holds one."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def absent(config: LayerConfig, shape: Workload, seed: int, expected: np.ndarray) -> float:
    """The error of no layer at all, which leaves the hidden states as they are: what loses as much
    has nothing of the layer's weights. `expected` is the layer's `output`."""
    return error(hidden_states(config, shape, seed).astype(np.float32), expected)


def of_whole_sequences(
    module: Callable[[torch.Tensor], torch.Tensor],
    config: LayerConfig,
    workload: Workload,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """What a module says of a workload's new tokens, float32, when past and new ones pass at once.

    `module` is a layer made for `uncached(workload)`.
    """
    states = torch.from_numpy(sequence_states(config, workload, seed)).to(dtype)
    with torch.inference_mode():
        found: np.ndarray = module(states)[:, workload.past :].float().numpy()
    return found


def uncached(workload: Workload) -> Workload:
    """The same sequences, all of their tokens in one pass and none in a cache."""
    return Workload(workload.batch_size, workload.length)
