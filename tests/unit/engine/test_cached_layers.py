"""Decoder layers with a key-value cache, against the same layers over whole sequences."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as remembered
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from memladder import formats
from memladder.core.case import Workload
from memladder.core.errors import GraphError, UsageError
from memladder.engine.compile import bundle
from memladder.engine.compile import layers as compile_layers
from memladder.engine.compile.compile import CompileOptions, compile_file
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.program.cache import CacheShape
from memladder.engine.program.plan import plan
from memladder.engine.program.steps import Rows, Step
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.engine.run.positions import Positions
from memladder.formats._shared.base import Format
from memladder.kernels import cuda, naive
from tests import hf_layers, layers
from tests.cached import CachedRunner

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

DEVICE = "cpu" if cuda.INTERPRETED else "cuda"

NAMES = ("llama", "bloom", "qwen3", "gemma2", "gpt_neox", "falcon", "opt")
# Their parts are those of the others, put together in other ways.
MORE = (
    *(
        "falcon_alibi",
        "mistral",
        "hunyuan",
        "gptj",
        "phi",
        "gpt2",
        "glm4",
        "mpt",
        "olmo2",
        "cohere",
    ),
)


@remembered
def packed(name: str) -> PackedLayer:
    """A layer exported as all are, 2 × 65 tokens without a past, for any shape."""
    path = hf_layers.exported(name, 2, 65).path
    with TemporaryDirectory() as folder:
        target = Path(folder) / bundle.WEIGHTS
        bundle.pack(compile_file(path, CompileOptions()), target)
        layer = packed_layer.load(target)
        block = torch.empty(packed_layer.device_bytes(layer), dtype=torch.uint8)
        layer = packed_layer.on_device(layer, block)
    return replace(layer, form=replace(layer.form, shape=None))


def states(layer: PackedLayer, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, layer.form.fused.hidden_size, generator=generator).half()


def whole(layer: PackedLayer, given: Tensor, activation: Format | None = None) -> Tensor:
    """One sequence through the program without a cache."""
    program = layer.form.program(Workload(1, len(given)), activation)
    planned = plan(program)
    arena = torch.full((arena_bytes(program, planned, naive),), 255, dtype=torch.uint8)
    execution = Execution(program, planned, layer, naive, arena)
    execution.input.copy_(given)
    execution.run()
    return execution.output.clone()


@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_whatever_is_compiled_has_a_past(name: str) -> None:
    layer = packed(name)
    given = states(layer, 63)
    expected = whole(layer, given)
    for size in (63, 17, 7, 1):
        cache = CacheShape(slots=3, context=64, chunk=size)
        workload = Workload(1, size)
        runner = CachedRunner(layer, cache, naive, [workload])
        found = runner.in_turn(workload, given, slot=1)
        assert hf_layers.relative_error(found, expected) <= 2e-3, size


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 17, 33, 65, 333])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_odd_lengths_and_rings(name: str, tokens: int) -> None:
    # Gemma's window is 8: of 333 tokens a ring of 128 is left.
    layer = packed(name)
    given = states(layer, tokens)
    expected = whole(layer, given)
    context = max(tokens, 200)
    for chunk in (1, 33) if tokens < 333 else (33, 64):
        cache = CacheShape(slots=2, context=context, chunk=chunk)
        workload = Workload(1, chunk)
        runner = CachedRunner(layer, cache, naive, [workload])
        if name == "gemma2":
            # Two heads of 16 columns, keys and values, of 2 bytes.
            assert len(runner.state) == 2 * 2 * 128 * 16 * 2 * 2
        found = runner.in_turn(workload, given, slot=1)
        assert hf_layers.relative_error(found, expected) <= 2e-3


def test_a_program_of_several_chunks() -> None:
    layer = packed("qwen3")
    given = states(layer, 333)
    cache = CacheShape(slots=1, context=666, chunk=333)
    program = layer.form.program(Workload(1, 333), cache=cache, chunk=128)
    starts = [s.values["start"] for s in program.steps if s.kernel == "cached_attention"]
    assert starts == [0, 128, 256]
    runner = CachedRunner(layer, cache, naive, [Workload(1, 333)], chunk=128)
    found = torch.cat([runner.run(Workload(1, 333), [part], [0])[0] for part in given.split(200)])
    assert hf_layers.relative_error(found, whole(layer, given)) <= 2e-3


LENGTHS = (17, 3, 0, 9)
PREFILL, DECODE = Workload(4, 17), Workload(4, 1)


def ragged(runner: CachedRunner, given: list[Tensor], busy: set[int]) -> list[Tensor]:
    """Prompts of several lengths at once, then five tokens of each; those not busy are idle."""
    prompts = [
        part[:n] if i in busy else part[:0]
        for i, (part, n) in enumerate(zip(given, LENGTHS, strict=True))
    ]
    found = [[part] for part in runner.run(PREFILL, prompts, range(4))]
    for step in range(5):
        new = [
            part[n + step : n + step + 1] if i in busy else part[:0]
            for i, (part, n) in enumerate(zip(given, LENGTHS, strict=True))
        ]
        for own, part in zip(found, runner.run(DECODE, new, range(4)), strict=True):
            own.append(part)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("format", ["fp16", "fp8", "int8"])
def test_a_ragged_batch_is_its_sequences(format: str) -> None:
    layer = packed("llama")
    cache = CacheShape(slots=4, context=64, chunk=17, format=format)
    given = [states(layer, n + 5, seed) for seed, n in enumerate(LENGTHS)]

    def runner() -> CachedRunner:
        return CachedRunner(layer, cache, naive, [PREFILL, DECODE])

    together = ragged(runner(), given, {0, 1, 2, 3})
    again = ragged(runner(), given, {0, 1, 2, 3})
    for i, found in enumerate(together):
        assert torch.equal(found, again[i])
        # Bit by bit, where the others of the batch are idle: nothing of one reaches another.
        assert torch.equal(ragged(runner(), given, {i})[i], found)
        # A batch of another size sums its products in another order.
        single = CachedRunner(layer, cache, naive, [Workload(1, 1)])
        alone = single.in_turn(Workload(1, 1), given[i])
        assert hf_layers.relative_error(found, alone) <= (1e-3 if format == "fp16" else 1e-2)


@pytest.mark.parametrize(("format", "bound"), [("fp8", 3e-2), ("int8", 1e-2)])
def test_caches_of_8_bits(format: str, bound: float) -> None:
    layer = packed("qwen3")
    given = states(layer, 63)
    expected = whole(layer, given)
    found = []
    for size in (63, 7, 1):
        cache = CacheShape(slots=1, context=63, chunk=size, format=format)
        runner = CachedRunner(layer, cache, naive, [Workload(1, size)])
        # Two heads of 16 codes and a float32 scale, keys and values.
        assert sum(b.nbytes for b in cache.state(2, 16, None)) == 63 * 2 * 2 * (16 + 4)
        found.append(runner.in_turn(Workload(1, size), given))
        assert 1e-3 < hf_layers.relative_error(found[-1], expected) < bound
    # What is held does not depend on how it came there, but for a rounding that a step makes much
    # of: attention's keys and values are products that are summed in another order.
    assert hf_layers.relative_error(found[1], found[0]) < bound / 3
    assert hf_layers.relative_error(found[2], found[0]) < bound / 3


def test_a_window_that_only_the_configuration_tells() -> None:
    # Exported with fewer tokens than its window, a layer shows none.
    layer = packed("mistral_full")
    given = states(layer, 150)
    cache = CacheShape(slots=1, context=150, chunk=10, window=8)
    runner = CachedRunner(layer, cache, naive, [Workload(1, 10)])
    found = runner.in_turn(Workload(1, 10), given)
    assert hf_layers.relative_error(found, whole(packed("mistral"), given)) <= 2e-3
    with pytest.raises(GraphError, match="window is 8 tokens, the configuration's 9"):
        packed("mistral").form.program(Workload(1, 1), cache=replace(cache, window=9))


def test_what_does_not_fit_is_refused_before_it_is_written() -> None:
    cache = CacheShape(slots=2, context=40, chunk=8)
    positions = Positions(cache, Workload(2, 8), torch.device("cpu"))
    positions.set([1, 0], [32, 5], [8, 3])
    before = positions.tensor.clone()
    assert before.tolist() == [[1, 32, 8], [0, 5, 3]]
    for slots, past, new, reason in (
        ([1, 0], [33, 5], [8, 3], "33 tokens and 8 new ones are 41, the context is 40"),
        ([1, 0], [0, 5], [9, 3], "9 new tokens of a sequence: 8 are the most"),
        ([2, 0], [0, 5], [1, 1], "slot 2"),
        ([1, 1], [0, 5], [1, 1], "slot 1"),
        ([1], [0], [1], "1 sequences; the program has 2"),
        ([1, 0], [-1, 5], [1, 1], "a past of -1 tokens"),
    ):
        with pytest.raises(UsageError, match=reason):
            positions.set(slots, past, new)
        assert torch.equal(positions.tensor, before)
    # Idle sequences may name any slot.
    positions.set([1, 1], [40, 0], [0, 1])
    for wrong in ({"slots": 0}, {"chunk": 41}, {"format": "int4"}, {"window": 0}, {"context": -1}):
        with pytest.raises(UsageError):
            replace(cache, **wrong)
    for shape in (Workload(3, 1), Workload(1, 9)):
        with pytest.raises(UsageError, match="the cache is for 2 sequences, and 8 new tokens"):
            packed("llama").form.program(shape, cache=cache)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(("llama", "fp16"), ("gemma2", "int8"), ("bloom", "fp8")),
        pytest.param("hunyuan", "fp16", marks=pytest.mark.slow),
    ],
)
def test_triton_s_kernels(name: str, format: str) -> None:
    layer = packed(name)
    cache = CacheShape(slots=3, context=150, chunk=17, format=format)
    prefill, decode = Workload(1, 17), Workload(2, 1)
    given = [states(layer, n, seed) for seed, n in enumerate((34, 5))]
    found = []
    for kernels in (naive, cuda):
        runner = CachedRunner(layer, cache, kernels, [prefill, decode], device=DEVICE)
        parts = [
            runner.in_turn(prefill, own[:-1], slot) for own, slot in zip(given, (2, 0), strict=True)
        ]
        parts += runner.run(decode, [own[-1:] for own in given], [2, 0])
        found.append(torch.cat(parts))
    bound = 2e-3 if format == "fp16" else 1e-2
    assert hf_layers.relative_error(found[1], found[0]) <= bound


@pytest.mark.parametrize(("weight", "activation"), [("fp8", "fp8"), ("int1", "int8"), ("int4", "")])
def test_quantised_activations(weight: str, activation: str, cache_dir: Path) -> None:
    path = compile_layers.ensure_packed(layers.narrow("llama"), formats.get(weight), cache_dir, 0)
    layer = packed_layer.load(path)
    kind = formats.get(activation) if activation else None
    given = states(layer, 33)
    expected = whole(layer, given, kind)
    for size in (33, 5, 1):
        workload = Workload(1, size)
        runner = CachedRunner(layer, CacheShape(1, 33, size), naive, [workload], kind)
        found = runner.in_turn(workload, given)
        assert hf_layers.relative_error(found, expected) <= (1e-2 if activation else 2e-3)


def test_state_is_no_part_of_the_arena() -> None:
    layer = packed("llama")
    plans = [
        plan(layer.form.program(Workload(3, rows), cache=CacheShape(3, context, 17)))
        for rows in (1, 17)
        for context in (65, 6500)
    ]
    assert plans[2].nbytes == plans[3].nbytes
    # Keys and values of two heads of 16 numbers of 2 bytes; each at a multiple of 256.
    for planned, context in zip(plans, (65, 6500, 65, 6500), strict=True):
        each = -(-3 * context * 2 * 16 * 2 // 256) * 256
        assert planned.state == {"keys": 0, "values": each}
        assert planned.state_bytes == 2 * each


def test_scalars_are_not_written() -> None:
    program = packed("llama").form.program(Workload(1, 1), cache=CacheShape(1, 65, 1))
    (scalar,) = program.scalars
    assert (scalar.name, scalar.rows, scalar.columns) == ("positions", 1, 3)
    wrong = Step("advance", {}, {"positions": Rows("positions", 0, 1)})
    with pytest.raises(ValueError, match="advance: writes the scalar positions"):
        replace(program, steps=(*program.steps, wrong))


@pytest.mark.parametrize(
    ("sequences", "rows", "heads", "kv_heads", "parts"),
    [
        # LLaMA-2-70B: 256 programs at batch 1; four parts at least where lengths may differ.
        *((1, 1, 64, 8, 32), (4, 1, 64, 8, 8), (32, 1, 64, 8, 4), (1, 16, 64, 8, 16)),
        *((32, 16, 64, 8, 1), (1, 17, 64, 8, 1)),
        # BLOOM-176B, and one head of keys.
        *((1, 1, 112, 112, 4), (1, 2, 112, 112, 2), (1, 1, 71, 1, 32)),
    ],
)
def test_parts_of_a_past(sequences: int, rows: int, heads: int, kv_heads: int, parts: int) -> None:
    cache = CacheShape(32, 4096, 512)
    assert cache.parts(sequences, rows, heads, kv_heads, None) == parts
    # None is shorter than 64 tokens.
    assert replace(cache, context=512).parts(sequences, rows, heads, kv_heads, None) <= 8
