"""What a row's number format explains of its error against the true layer, and what it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memladder import formats, frameworks, models
from memladder.core.case import Case, Workload
from memladder.core.verification import Check
from memladder.engine.compile import layers
from memladder.engine.packed import packed_layer, reference
from memladder.frameworks._shared.base import Job
from memladder.frameworks.ladder import Ladder
from memladder.models import reference as true_layer
from memladder.models import weights

# transformers warns about its own code.
pytestmark = pytest.mark.filterwarnings("default")

# 10 ** (−SQNR / 20) of weights and activations, by the formats' theory on normal numbers.
THEORY = {
    "ladder": 0.0,
    "ladder_fp16_int4": 0.111,
    "ladder_fp16_nf4": 0.092,
    "ladder_fp8_fp8": 0.0374,
    "ladder_mxfp8_mxfp8": 0.0415,
    "ladder_int8_int1": 0.602,
    "ladder_fp16_int2": 0.345,
    "ladder_fp16_mxfp4": 0.115,
}


@pytest.mark.parametrize("name", THEORY)
@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_right_weights_stay_within_and_others_beyond(
    name: str, model: str, cache_dir: Path
) -> None:
    framework = frameworks.get(name)
    assert isinstance(framework, Ladder)
    shape = Workload(2, 9)
    job = Job(Case(model, name, shape, "cpu"), models.narrow_config(model), cache_dir)
    bound = framework.quantisation_tolerance(job)
    # The shorter rows of narrow layers lose less, and never a half less.
    assert 0.8 * THEORY[name] <= (bound - 2e-3) / 1.6 <= 1.15 * THEORY[name] + 1e-9
    path = weights.ensure(job.config, cache_dir, 0)
    true = true_layer.output(job.config, path, shape, 0)
    # As the worker does.
    alone = 0.98 * true_layer.absent(job.config, shape, 0, true)
    packed = packed_layer.load(
        layers.ensure_packed(job.config, formats.get(framework.weight), cache_dir, 0)
    )
    sources = layers.ensure(job.config, cache_dir).sources

    def agrees() -> bool:
        found = reference.output(
            job.config, packed, sources, shape, 0, framework.activation_format()
        )
        lost = true_layer.error(found, true)
        return Check(model, shape, 9, 1e-4, 2e-3, lost, min(bound, alone)).agrees

    assert agrees()
    # Codes of other weights, and of none: with themselves as the reference they would agree.
    generator = torch.Generator().manual_seed(0)
    for matrix in packed.matrices.values():
        codes = matrix.codes
        flat = codes.view(-1)[torch.randperm(codes.numel(), generator=generator)]
        codes.copy_(flat.view(codes.shape))
    assert not agrees()
    for matrix in packed.matrices.values():
        if matrix.scales is None:
            matrix.codes.zero_()
        elif matrix.scales.is_floating_point():
            matrix.scales.zero_()
    assert not agrees()


def test_a_check_says_which_of_both_bounds_it_misses() -> None:
    def check(error: float, lost: float | None, most: float | None) -> Check:
        return Check("llama", Workload(1, 1), 1, error, 2e-3, lost, most)

    assert check(1e-3, 0.1, 0.2).agrees
    assert check(1e-3, 5.0, None).agrees
    for one in (check(1e-3, 0.3, 0.2), check(1e-3, np.nan, 0.2), check(1e-3, None, 0.2)):
        assert not one.keeps_the_layer
        assert not one.agrees
    assert check(1e-2, 0.1, 0.2).keeps_the_layer
    assert not check(1e-2, 0.1, 0.2).agrees
