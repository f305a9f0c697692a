"""`load_layer`: the engine as a function."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from memladder import formats, load_layer, models
from memladder.core.case import Workload
from memladder.core.errors import FormatError, OverflowedError, UsageError
from memladder.engine.compile import bundle, layers
from memladder.engine.compile.compile import CompileOptions, compile_file
from memladder.engine.packed import packed_layer, reference
from memladder.engine.program.plan import plan
from memladder.engine.run.execute import Execution
from memladder.kernels import naive
from memladder.models import LayerConfig
from memladder.models.weights import hidden_states
from tests.unit.onnx_models import save

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


def test_what_is_no_tensor_is_refused(cache_dir: Path) -> None:
    layer = load_layer(packed("llama", "int4", cache_dir))
    hidden = config("llama").values["hidden_size"]
    for wrong, kind in (([[[0.0] * hidden]], "list"), (np.zeros((1, 1, hidden)), "ndarray")):
        with pytest.raises(UsageError, match=f"of type {kind}; allowed: a torch tensor"):
            layer(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"torch\.sparse_coo; allowed: torch\.strided"):
        layer(torch.zeros(1, 1, hidden).to_sparse())


def test_threads_may_share_a_layer(cache_dir: Path) -> None:
    path = packed("llama", "int4", cache_dir)
    layer = load_layer(path)
    hidden = config("llama").values["hidden_size"]
    # Shapes that differ change the arena under way.
    states = [
        torch.randn(2, 5 + i, hidden, generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    expected = [layer(x) for x in states]
    wrong: list[int] = []

    def call(number: int) -> None:
        wrong.extend(
            number for _ in range(25) if not torch.equal(layer(states[number]), expected[number])
        )

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_share_weights_and_nothing_else(cache_dir: Path) -> None:
    layer = load_layer(packed("llama", "int4", cache_dir))
    states = torch.randn(1, 7, config("llama").values["hidden_size"])
    expected = layer(states)
    for other in (copy.copy(layer), copy.deepcopy(layer), copy.deepcopy([layer])[0]):
        assert torch.equal(other(states), expected)
        assert other.packed is layer.packed
        assert other._prepared(Workload(1, 7)) is not layer._prepared(Workload(1, 7))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(UsageError, match=r"a layer can't be pickled: .* call load_layer"):
            pickle.dumps(layer, protocol)


def test_values_beyond_float16(cache_dir: Path) -> None:
    path = packed("llama", "fp16", cache_dir)
    layer = load_layer(path)
    states = torch.randn(1, 7, config("llama").values["hidden_size"])
    for value, said in ((1e6, "hold 1e\\+06; the layer computes in float16"), (np.nan, "hold NaN")):
        changed = states.clone()
        changed[0, 3, 5] = value
        with pytest.raises(OverflowedError, match=f"hidden states {said}"):
            layer(changed)
        assert not load_layer(path, check="none")(changed).isfinite().all()
    # float16 has the input, and not what the layer makes of it: the gate's weights are huge.
    large = load_layer(path)
    large.packed.matrices["gate"].codes.view(torch.float16).fill_(6e4)
    with pytest.raises(OverflowedError, match=r"beyond float16's 65504, .* step \d+, \w+ \(gate"):
        large(states)
    assert layer(states).isfinite().all()
    with pytest.raises(UsageError, match="check 'all' is not one of output, steps, none"):
        load_layer(path, check="all")


def test_an_infinity_that_the_output_hides(tmp_path: Path) -> None:
    """A clip makes a number of it: only a look at every step tells."""
    nodes = [
        ("MatMul", ("x", "w"), "m"),
        ("MatMul", ("m", "w"), "n"),
        ("Clip", ("n", "least", "most"), "c"),
        ("Add", ("c", "x"), "y"),
    ]
    constants = {
        "w": np.full((8, 8), 1e3, np.float32),
        "least": np.float32(-1),
        "most": np.float32(1),
    }
    path = save(tmp_path / "m.onnx", nodes, constants)
    bundle.pack(compile_file(path, CompileOptions("welder")), tmp_path / "packed")
    states = torch.ones(2, 5, 8)
    assert load_layer(tmp_path / "packed", device="cpu")(states).isfinite().all()
    layer = load_layer(tmp_path / "packed", device="cpu", check="steps")
    with pytest.raises(OverflowedError, match=r"beyond float16's 65504, first those of step 1, "):
        layer(states)


def test_files_and_formats_that_are_none(cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load_layer(tmp_path / "nothing.safetensors")
    path = packed("llama", "int4", cache_dir)
    with pytest.raises(UsageError, match="nf4 is no activation format; allowed: fp16, fp8, int8"):
        load_layer(path, activation="nf4")
    with pytest.raises(FormatError, match="unknown format 'fp7'"):
        load_layer(path, activation="fp7")
