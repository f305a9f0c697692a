"""The Triton kernels, each against its twin in `kernels.naive`.

Here under Triton's interpreter on the CPU; `tests/gpu` runs the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memladder import formats
from memladder.core.errors import UnavailableError
from memladder.kernels import cuda, naive
from memladder.kernels.cuda import skinny
from memladder.kernels.packed import PackedMatrix


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DEVICE = "cpu" if cuda.INTERPRETED else "cuda"


def run(kernel: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Call it with all operands on the device; what it wrote comes back."""
    if DEVICE == "cpu":
        kernel(*arguments, **options)
        return
    moved: dict[int, Any] = {}

    def move(part: Any) -> Any:
        if isinstance(part, PackedMatrix):
            beside = {name: move(getattr(part, name)) for name in ("codes", "scales", "zeros")}
            return replace(part, **beside)
        if isinstance(part, Tensor):
            return moved.setdefault(id(part), part.to(DEVICE))
        return part

    operands = [move(part) for part in arguments]
    kernel(*operands, **{name: move(part) for name, part in options.items()})
    for part in (*arguments, *options.values()):
        if id(part) in moved:
            part.copy_(moved[id(part)])


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator) * std


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float16)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def quantised(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    kind = formats.get(spec)
    assert kind.scale_dtype is not None
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    scales = torch.zeros(x.shape[0], kind.groups(x.shape[1])).to(kind.scale_dtype)
    naive.quantise(x, codes, scales, format=spec)
    return codes, scales


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 300), (3, 4097), (2, 14336)])
def test_norms(rows: int, columns: int) -> None:
    x = (3 + normal(rows, columns)).half()
    weight, bias = normal(columns, seed=1).half(), normal(columns, seed=2).half()
    found, expected = poisoned(rows, columns), poisoned(rows, columns)
    run(cuda.rms_norm, x, weight, found, eps=1e-5)
    naive.rms_norm(x, weight, expected, eps=1e-5)
    assert error(found, expected) < 1e-4
    # Over the input itself.
    again = x.clone()
    run(cuda.layer_norm, again, weight, bias, again, eps=1e-5)
    naive.layer_norm(x, weight, bias, expected, eps=1e-5)
    assert error(again, expected) < 1e-4


@pytest.mark.parametrize("spec", ["fp8", "fp8:element=e5m2", "mxfp8", "mxfp8:element=e5m2", "int8"])
@pytest.mark.parametrize("columns", [1, 200, 4500])
def test_activations_are_quantised_code_by_code(spec: str, columns: int) -> None:
    x = normal(9, columns).half()
    x[2] = 0
    x[3, : columns // 2] = 0
    x[4] *= 1e-4
    x[5, 0], x[6, 0] = 65504, 6e-8
    # Ties: sums of two neighbours of the grid.
    x[7] = torch.arange(columns).half() / 16
    x[8, 0] = 448
    expected = quantised(x, spec)
    found = tuple(torch.full_like(part, 99) for part in expected)
    run(cuda.quantise, x, *found, format=spec)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


# What numpy says of NaN as an integer: the interpreter is made of numpy.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("spec", ["fp8", "int8", "mxfp8"])
def test_what_is_not_a_number_stays_none(spec: str) -> None:
    x = normal(2, 96).half()
    x[1, 40] = torch.nan
    codes = torch.zeros(2, 96, dtype=torch.uint8)
    kind = formats.get(spec)
    assert kind.scale_dtype is not None
    scales = torch.zeros(2, kind.groups(96)).to(kind.scale_dtype)
    run(cuda.quantise, x, codes, scales, format=spec)
    values = kind.scale_values(scales)
    assert values[0].isfinite().all()
    assert values[1].isnan().any()


def test_an_activation_without_kernel_is_refused() -> None:
    x = normal(1, 32).half()
    with pytest.raises(UnavailableError, match="no CUDA kernel quantises activations to nf4"):
        run(cuda.quantise, x, x, x, format="nf4")


@pytest.mark.parametrize(("heads", "d", "start"), [(1, 64, 0), (3, 96, 4000), (8, 128, 100_000)])
def test_rotary(heads: int, d: int, start: int) -> None:
    x = normal(9, heads * d).half()
    frequencies = 10_000 ** (-torch.arange(0, d, 2) / d)
    options = {"head_dim": d, "start": start, "seq_len": start + 4}
    found, expected = poisoned(9, heads * d), poisoned(9, heads * d)
    run(cuda.rotary, x, frequencies, found, **options)
    naive.rotary(x, frequencies, expected, **options)
    # What is computed in float32 alike may be rounded to float16 differently once in a while.
    assert error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("sequences", "queries", "keys", "heads", "kv_heads", "d"),
    [
        (1, 1, 1, 4, 2, 64),
        (32, 1, 1, 2, 2, 128),
        (7, 1, 1, 3, 3, 96),
        (2, 17, 17, 4, 2, 128),
        (1, 70, 333, 2, 1, 64),
        (1, 5, 133, 2, 2, 96),
        (1, 200, 200, 2, 2, 32),
    ],
)
@pytest.mark.parametrize("alibi", [False, True])
def test_attention(
    sequences: int, queries: int, keys: int, heads: int, kv_heads: int, d: int, alibi: bool
) -> None:
    query = normal(sequences * queries, heads * d).half()
    key = normal(sequences * keys, kv_heads * d, seed=1).half()
    value = normal(sequences * keys, kv_heads * d, seed=2).half()
    options: dict[str, Any] = {"slopes": torch.arange(1, heads + 1) / heads} if alibi else {}
    sizes = {"sequences": sequences, "heads": heads, "kv_heads": kv_heads}
    expected = poisoned(*query.shape)
    naive.attention(query, key, value, expected, **sizes, **options)
    # Over the queries.
    again = query.clone()
    run(cuda.attention, query, key, value, query, **sizes, **options)
    assert error(query, expected) < 6e-4
    run(cuda.attention, again, key, value, again, **sizes, **options, exact=True)
    assert error(again, expected) < 5e-5


PAIRS = [
    *(("fp16", "fp16"), ("int4", "fp16"), ("nf4", "fp16"), ("fp8", "fp8"), ("mxfp8", "mxfp8")),
    *(("int1", "int8"), ("int2", "fp16"), ("mxfp4", "fp16"), ("int1", "fp16")),
    *(("fp8", "fp16"), ("mxfp8", "fp16"), ("int4:zero_point=true", "fp16")),
    *(("int4:group_size=32", "fp16"), ("int4:group_size=256", "fp16")),
    *(("nf4:group_size=32", "fp16"), ("int2:group_size=32", "fp16")),
    ("fp8:element=e5m2,scale=float16", "fp8:element=e5m2"),
    ("mxfp8:element=e5m2", "mxfp8:element=e5m2"),
]


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 37, 528), (1, 19, 301), (3, 130, 300), (40, 64, 1024), (130, 3, 96)]
)
def test_matmul(weight: str, activation: str, rows: int, n: int, k: int) -> None:
    kind = formats.get(weight)
    packed = PackedMatrix.pack(kind, kind.quantise(normal(n, k, seed=1, std=0.05)))
    x = normal(rows, k).half()
    options: dict[str, Any] = {}
    if activation != "fp16":
        x, scales = quantised(x, activation)
        options = {"scales": scales, "format": activation}
    options |= {
        "bias": normal(n, seed=2).half(),
        "activation": ("silu", "gelu", "gelu_tanh", "relu", "")[rows % 5],
        "residual": normal(rows, n, seed=4).half(),
    }
    found, expected = poisoned(rows, n), poisoned(rows, n)
    run(cuda.matmul, x, packed, found, **options)
    naive.matmul(x, packed, expected, **options)
    assert error(found, expected) < 5e-4
    # The residual may be written over; alone, the product.
    residual = options["residual"]
    run(cuda.matmul, x, packed, residual, **options)
    assert torch.equal(residual, found)
    options = {name: options[name] for name in ("scales", "format") if name in options}
    run(cuda.matmul, x, packed, found, **options)
    naive.matmul(x, packed, expected, **options)
    assert error(found, expected) < 5e-4


FIGURE = [
    *(("fp16", "fp16"), ("int4", "fp16"), ("nf4", "fp16")),
    *(("fp8", "fp8"), ("mxfp8", "mxfp8"), ("int1", "int8")),
]


@pytest.mark.parametrize(("weight", "activation"), FIGURE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 37, 528), (9, 130, 512), (70, 64, 320)])
def test_gated_linear_units(
    weight: str, activation: str, biased: bool, rows: int, n: int, k: int
) -> None:
    kind = formats.get(weight)
    gate, up = (
        PackedMatrix.pack(kind, kind.quantise(normal(n, k, seed=seed, std=0.05))) for seed in (1, 2)
    )
    x = normal(rows, k).half()
    options: dict[str, Any] = {"activation": "silu" if biased else "gelu_tanh"}
    if activation != "fp16":
        x, scales = quantised(x, activation)
        options |= {"scales": scales, "format": activation}
    if biased:
        options |= {"gate_bias": normal(n, seed=3).half(), "up_bias": normal(n, seed=4).half()}
    found, expected = poisoned(rows, n), poisoned(rows, n)
    run(cuda.glu, x, gate, up, found, **options)
    naive.glu(x, gate, up, expected, **options)
    # Two products' errors of 5e-4, each independent of the other.
    assert error(found, expected) < 7e-4


@pytest.mark.parametrize(("weight", "activation"), FIGURE)
@pytest.mark.parametrize("parts", [("query", "key", "value"), ("key", "value"), ("query",)])
@pytest.mark.parametrize(("rows", "k"), [(1, 301), (6, 320), (70, 256)])
def test_attention_s_products(
    weight: str, activation: str, parts: tuple[str, ...], rows: int, k: int
) -> None:
    kind = formats.get(weight)
    sizes = {"query": 2 * 64, "key": 64, "value": 64}
    x = normal(rows, k).half()
    options: dict[str, Any] = {}
    if activation != "fp16":
        x, scales = quantised(x, activation)
        options = {"scales": scales, "format": activation}
    if rows != 6:
        frequencies = 10_000 ** (-torch.arange(0, 64, 2) / 64)
        options |= {"frequencies": frequencies, "head_dim": 64, "start": 3, "seq_len": 40}
    for number, part in enumerate(parts):
        matrix = kind.quantise(normal(sizes[part], k, seed=number, std=0.05))
        options[f"{part}_weight"] = PackedMatrix.pack(kind, matrix)
        if rows == 6:
            options[f"{part}_bias"] = normal(sizes[part], seed=number).half()
    found, expected = ({part: poisoned(rows, sizes[part]) for part in parts} for _ in range(2))
    run(cuda.qkv, x, **options, **found)
    naive.qkv(x, **options, **expected)
    for part in parts:
        assert error(found[part], expected[part]) < 7e-4


@pytest.mark.parametrize(("weight", "activation"), [("int4", "fp16"), ("int1", "int8")])
def test_a_product_divided_along_k(weight: str, activation: str) -> None:
    kind = formats.get(weight)
    packed = PackedMatrix.pack(kind, kind.quantise(normal(150, 4200, std=0.05)))
    x = normal(5, 4200).half()
    options: dict[str, Any] = {"residual": normal(5, 150, seed=1).half()}
    if activation != "fp16":
        x, scales = quantised(x, activation)
        options |= {"scales": scales, "format": activation}
    found, again, expected = (poisoned(5, 150) for _ in range(3))
    workspace = torch.zeros(skinny.WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    skinny.set_workspace(workspace)
    try:
        run(cuda.matmul, x, packed, found, **options)
        # Parts of sums were there, and the counters are ready for the next launch.
        assert workspace.any()
        run(cuda.matmul, x, packed, again, **options)
    finally:
        skinny.set_workspace(None)
    assert torch.equal(found, again)
    naive.matmul(x, packed, expected, **options)
    assert error(found, expected) < 5e-4


@pytest.mark.parametrize("std", [1e-6, 20.0])
def test_mx_scales_of_any_size(std: float) -> None:
    # float16 holds neither these weights nor their scales: kernels take them relative to the top.
    kind = formats.get("mxfp8")
    packed = PackedMatrix.pack(kind, kind.quantise(normal(20, 256, std=std)))
    for rows in (1, 3):
        codes, scales = quantised((normal(rows, 256) / std).clamp(-100, 100).half(), "mxfp8")
        found, expected = poisoned(rows, 20), poisoned(rows, 20)
        run(cuda.matmul, codes, packed, found, scales=scales, format="mxfp8")
        naive.matmul(codes, packed, expected, scales=scales, format="mxfp8")
        assert error(found, expected) < 5e-4


def test_a_pair_of_formats_without_kernel_is_refused() -> None:
    kind = formats.get("int4")
    packed = PackedMatrix.pack(kind, kind.quantise(normal(8, 128)))
    codes, scales = quantised(normal(2, 128).half(), "int8")
    line = "^no CUDA kernel multiplies int8 by int4 weights$"
    with pytest.raises(UnavailableError, match=line):
        run(cuda.matmul, codes, packed, poisoned(2, 8), scales=scales, format="int8")
