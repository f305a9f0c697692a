"""`load_layer`: the engine as a function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memladder import formats, load_layer, models
from memladder.core.case import Workload
from memladder.core.errors import FormatError, UsageError
from memladder.engine.compile import layers
from memladder.engine.packed import packed_layer, reference
from memladder.engine.program.plan import plan
from memladder.engine.run.execute import Execution
from memladder.kernels import naive
from memladder.models import LayerConfig
from memladder.models.weights import hidden_states

# transformers warns about its own code.
pytestmark = pytest.mark.filterwarnings("default")


def config(model: str) -> LayerConfig:
    definition = models.definition(model)
    return LayerConfig(model, definition.read(definition.NARROW))


def packed(model: str, spec: str, cache_dir: Path) -> Path:
    return layers.ensure_packed(config(model), formats.get(spec), cache_dir, 0)


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("spec", ["int4", "fp16"])
def test_it_computes_the_layer_at_one_shape_after_another(
    model: str, spec: str, cache_dir: Path
) -> None:
    path = packed(model, spec, cache_dir)
    layer = load_layer(path)
    for shape in (Workload(2, 17), Workload(1, 1), Workload(2, 17)):
        states = torch.from_numpy(hidden_states(config(model), shape, 0))
        states = states.reshape(shape.batch_size, shape.seq_len, -1)
        before = states.clone()
        found = layer(states)
        assert torch.equal(states, before)
        assert (found.shape, found.dtype) == (states.shape, torch.float16)
        made = packed_layer.load(path)
        sources = layers.ensure(config(model), cache_dir).sources
        expected = reference.output(config(model), made, sources, shape, 0, None)
        difference = np.linalg.norm(found.float().numpy() - expected)
        assert difference / np.linalg.norm(expected) <= 2e-3
        # The result is the caller's: the next call leaves it as it is.
        kept = found.clone()
        layer(torch.zeros_like(states))
        assert torch.equal(found, kept)
        assert layer(states.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "given", "activation"),
    [("fp8", None, "fp8"), ("int1", None, "int8"), ("mxfp8", None, "mxfp8"), ("fp8", "fp16", None)],
)
def test_activations_are_in_the_weights_own_format_or_the_one_given(
    spec: str, given: str | None, activation: str | None, cache_dir: Path
) -> None:
    path = packed("llama", spec, cache_dir)
    shape = Workload(1, 9)
    states = torch.from_numpy(hidden_states(config("llama"), shape, 0)).view(1, 9, -1)
    found = load_layer(path, activation=given)(states)
    # The same steps, bound by hand.
    kind = None if activation is None else formats.get(activation)
    made = packed_layer.load(path)
    program = made.form.program(shape, kind)
    planned = plan(program)
    arena = torch.empty(planned.nbytes, dtype=torch.uint8)
    execution = Execution(program, planned, made, naive, arena)
    execution.input.copy_(states.view(9, -1))
    execution.run()
    assert torch.equal(found.view(9, -1), execution.output)


def test_what_is_no_hidden_states_is_refused(cache_dir: Path) -> None:
    layer = load_layer(packed("llama", "int4", cache_dir))
    hidden = config("llama").values["hidden_size"]
    for wrong in (
        torch.zeros(2, hidden),
        torch.zeros(1, 1, hidden + 1),
        torch.zeros(1, 1, hidden).int(),
    ):
        with pytest.raises(UsageError, match=rf"allowed: \[batch, sequence, {hidden}\] in float16"):
            layer(wrong)
    with pytest.raises(UsageError, match="seq_len 0 is not a whole number"):
        layer(torch.zeros(1, 0, hidden))


def test_files_and_formats_that_are_none(cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load_layer(tmp_path / "nothing.safetensors")
    path = packed("llama", "int4", cache_dir)
    with pytest.raises(UsageError, match="nf4 is no activation format; allowed: fp16, fp8, int8"):
        load_layer(path, activation="nf4")
    with pytest.raises(FormatError, match="unknown format 'fp7'"):
        load_layer(path, activation="fp7")
