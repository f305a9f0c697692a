"""The naive kernels against float64 twins that see whole matrices at once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memladder import formats
from memladder.formats._shared.base import Quantised
from memladder.kernels import naive
from memladder.kernels.packed import PackedMatrix

WEIGHTS = ("fp16", "int4", "int4:zero_point=true", "nf4", "fp8", "mxfp8", "int1", "int2", "mxfp4")
SHAPES = ((1, 704, 65), (17, 100, 130), (513, 33, 1), (3, 4500, 70))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float16)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("columns", [7, 8200])
def test_norms(rows: int, columns: int) -> None:
    x, weight, bias = normal(rows, columns), normal(columns, seed=1), normal(columns, seed=2)
    x64 = x.double()
    out = poisoned(rows, columns)
    naive.rms_norm(x, weight, out, eps=1e-5)
    root = (x64.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    assert error(out, x64 / root * weight.double()) < 4e-4
    naive.layer_norm(x, weight, bias, x, eps=1e-5)
    expected = functional.layer_norm(x64, (columns,), weight.double(), bias.double(), 1e-5)
    assert error(x, expected) < 4e-4
    x = normal(rows, columns)
    naive.rms_norm(x, weight, x, eps=1e-5)
    assert torch.equal(x, out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_with_packed_weights(name: str, shape: tuple[int, int, int]) -> None:
    rows, k, n = shape
    kind = formats.get(name)
    quantised = kind.quantise(normal(n, k, seed=1))
    x, bias, out = normal(rows, k), normal(n, seed=2), poisoned(rows, n)
    naive.matmul(x, PackedMatrix.pack(kind, quantised), out, bias=bias)
    expected = x.double() @ kind.dequantise(quantised).double().t() + bias.double()
    assert error(out, expected) < 4e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("activation", "weight"),
    [("fp8", "fp8"), ("mxfp8", "mxfp8"), ("int8", "int1"), ("int8", "int8")],
)
def test_products_with_quantised_activations(
    activation: str, weight: str, shape: tuple[int, int, int]
) -> None:
    rows, k, n = shape
    a, w = formats.get(activation), formats.get(weight)
    matrix = w.quantise(normal(n, k, seed=1))
    x, out = normal(rows, k), poisoned(rows, n)
    assert a.scale_dtype is not None
    codes = torch.full((rows, k), 255, dtype=torch.uint8)
    scales = torch.full((rows, a.groups(k)), 255).to(a.scale_dtype)
    naive.quantise(x, codes, scales, format=activation)
    known = a.quantise(x)
    assert torch.equal(codes, known.codes)
    assert known.scales is not None
    assert torch.equal(scales, known.scales)
    naive.matmul(x=codes, weight=PackedMatrix.pack(w, matrix), out=out, scales=scales,
                 format=activation)  # fmt: skip
    expected = a.dequantise(known).double() @ w.dequantise(matrix).double().t()
    assert error(out, expected) < 4e-4


@pytest.mark.parametrize("weight", ["int1", "int8"])
def test_integers_are_summed_exactly(weight: str) -> None:
    rows, k, n = 5, 5000, 67
    generator = np.random.default_rng(0)
    x = generator.integers(-127, 128, (rows, k), dtype=np.int8)
    w = generator.integers(-1, 1, (n, k), dtype=np.int8) | 1
    codes = torch.from_numpy((w > 0).astype(np.uint8) if weight == "int1" else w.view(np.uint8))
    kind = formats.get(weight)
    # Scales of 1/64 keep the sums within float16 and change no bit of them.
    packed = PackedMatrix.pack(
        kind, Quantised(codes, torch.full((n, 1), 1 / 64, dtype=kind.scale_dtype))
    )
    out = poisoned(rows, n)
    naive.matmul(
        torch.from_numpy(x.view(np.uint8)), packed, out, scales=torch.ones(rows, 1), format="int8"
    )
    sums = x.astype(np.int64) @ w.astype(np.int64).T
    assert np.array_equal(out.numpy(), (sums / 64).astype(np.float16))


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("", lambda x: x),
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
        ("relu", functional.relu),
    ],
)
def test_epilogues(name: str, twin) -> None:
    kind = formats.get("int4")
    gate, up = (kind.quantise(normal(130, 200, seed=seed) / 14) for seed in (1, 4))
    packed = PackedMatrix.pack(kind, gate), PackedMatrix.pack(kind, up)
    x, residual, bias = normal(9, 200), normal(9, 130, seed=3), normal(130, seed=5)
    product = x.double() @ kind.dequantise(gate).double().t()
    expected = twin(product) + residual.double()
    out = poisoned(9, 130)
    naive.matmul(x, packed[0], out, activation=name, residual=residual)
    assert error(out, expected) < 5e-4
    naive.matmul(x, packed[0], residual, activation=name, residual=residual)
    assert torch.equal(residual, out)
    other = x.double() @ kind.dequantise(up).double().t()
    naive.glu(x, *packed, out, activation=name)
    assert error(out, twin(product) * other) < 5e-4
    naive.glu(x, *packed, out, activation=name, gate_bias=bias, up_bias=bias)
    assert error(out, twin(product + bias.double()) * (other + bias.double())) < 5e-4


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """[rows, heads, d] as complex numbers, multiplied by e^(i · angle)."""
    low, high = x.double().chunk(2, dim=-1)
    angles = positions.double().outer(frequencies.double()).unsqueeze(1)
    turned = torch.complex(low, high) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_rotary_positions_start_anywhere_and_wrap() -> None:
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    x = normal(40, 3 * 64)
    positions = torch.arange(40).add(25) % 30
    expected = rotated(x.view(40, 3, 64), positions, frequencies).flatten(1)
    naive.rotary(x, frequencies, x, head_dim=64, start=25, seq_len=30)
    assert error(x, expected) < 4e-4


def test_attention_s_products_some_or_all_of_them() -> None:
    kind = formats.get("int4")
    frequencies = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    parts = [kind.quantise(normal(n, 200, seed=n) / 14) for n in (128, 64, 65)]
    query, key, value = (PackedMatrix.pack(kind, part) for part in parts)
    x, bias = normal(9, 200), normal(128, seed=2)
    q, k, v = (poisoned(9, len(part.codes)) for part in parts)
    naive.qkv(
        *(x,),
        **{"query_weight": query, "key_weight": key, "query": q, "key": k, "query_bias": bias},
        **{"frequencies": frequencies, "head_dim": 32, "start": 5, "seq_len": 9},
    )
    positions = torch.arange(9).add(5) % 9
    for out, part, offset in ((q, parts[0], bias.double()), (k, parts[1], 0.0)):
        plain = x.double() @ kind.dequantise(part).double().t() + offset
        turned = rotated(plain.view(9, -1, 32), positions, frequencies).flatten(1)
        assert error(out, turned) < 6e-4
    naive.qkv(x, value_weight=value, value=v)
    assert error(v, x.double() @ kind.dequantise(parts[2]).double().t()) < 5e-4


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    ("sequences", "queries", "keys", "heads", "kv_heads", "d"),
    [(1, 1, 1, 4, 2, 64), (3, 17, 17, 6, 6, 32), (1, 100, 1000, 8, 2, 64), (2, 600, 600, 2, 1, 96)],
)
def test_attention(
    alibi: bool, sequences: int, queries: int, keys: int, heads: int, kv_heads: int, d: int
) -> None:
    query = 3 * normal(sequences * queries, heads * d)
    key = 3 * normal(sequences * keys, kv_heads * d, seed=1)
    value = normal(sequences * keys, kv_heads * d, seed=2)
    slopes = 2.0 ** -(torch.arange(heads) + 1.0)

    q = query.double().view(sequences, queries, heads, d)
    at = torch.arange(keys - queries, keys)
    k, v = (x.double().view(sequences, keys, kv_heads, d) for x in (key, value))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2) for x in (k, v))
    distance = torch.arange(keys) - at.unsqueeze(1)
    bias = torch.zeros(heads, queries, keys, dtype=torch.float64)
    if alibi:
        # By the key's position, as models write it: softmax does not tell.
        bias += slopes.double().view(-1, 1, 1) * torch.arange(keys)
    bias = bias.masked_fill(distance > 0, -torch.inf)
    expected = functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, bias)
    expected = expected.transpose(1, 2).reshape(sequences * queries, heads * d)

    naive.attention(
        *(query, key, value, query),
        **{"sequences": sequences, "heads": heads, "kv_heads": kv_heads},
        slopes=slopes if alibi else None,
    )
    assert error(query, expected) < 5e-4


def test_attention_bears_scores_that_exp_does_not() -> None:
    # Scores of some ±50,000: e to the power of 89 is already beyond float32.
    d, keys = 64, 700
    query, key = 150 * normal(keys, d), 150 * normal(keys, d, seed=1)
    value, out = normal(keys, d, seed=2), poisoned(keys, d)
    naive.attention(query, key, value, out, sequences=1, heads=1, kv_heads=1)
    scores = (query.double() @ key.double().t()) / d**0.5
    assert float(scores.abs().max()) > 20_000
    scores = scores.masked_fill(torch.ones(keys, keys, dtype=torch.bool).triu(1), -torch.inf)
    assert error(out, scores.softmax(dim=1) @ value.double()) < 4e-4


# A process of its own, so that its peak is the kernel's; warmed up, so that libraries are there.
# What the allocator keeps of earlier blocks goes back first: a kernel could use it unseen.
_TEMPORARIES = """
import ctypes, sys, torch
from pathlib import Path
from memladder import formats
from memladder.kernels import naive
from memladder.kernels.packed import PackedMatrix
from memladder.kernels.layout import Layout

def packed(name, n, k):
    kind = formats.get(name)
    layout = Layout.of(kind, n, k)
    dtype = kind.scale_dtype
    scales = None if dtype is None else torch.ones(kind.groups(k), n).to(dtype)
    return PackedMatrix(kind, layout, torch.zeros(layout.shape, dtype=torch.uint8).fill_(1), scales)

def calls(kernel, m, k, n):
    x, wide = torch.ones(m, k).half(), torch.ones(m, n).half()
    if kernel.startswith("attention"):
        # attention:queries a sequence:keys a sequence:key and value heads
        queries, keys, kv_heads = map(int, kernel.split(":")[1:])
        key = torch.ones(m // queries * keys, 128 * kv_heads).half()
        return lambda: naive.attention(x, key, key, x, sequences=m // queries, heads=k // 128,
                                       kv_heads=kv_heads)
    if kernel == "quantise":
        codes, scales = torch.ones(m, k, dtype=torch.uint8), torch.ones(m, 1)
        return lambda: naive.quantise(x, codes, scales, format="fp8")
    if kernel == "rms_norm":
        return lambda: naive.rms_norm(x, x[0], x, eps=1e-5)
    weight = packed(kernel, n, k)
    activation = {"fp8": "fp8", "mxfp8": "mxfp8", "int1": "int8"}.get(kernel)
    if activation:
        kind = formats.get(activation)
        codes = torch.zeros(m, k, dtype=torch.uint8)
        scales = torch.ones(m, kind.groups(k)).to(kind.scale_dtype)
        return lambda: naive.matmul(codes, weight, wide, scales=scales, format=activation)
    return lambda: naive.matmul(x, weight, wide)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

kernel, m, k, n = sys.argv[1], *map(int, sys.argv[2:])
calls("attention:32:32:8" if kernel.startswith("attention") else kernel, 32, 1024, 256)()
call = calls(kernel, m, k, n)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
call()
print(status("VmHWM:") - before)
"""


@pytest.mark.parametrize(
    ("kernel", "rows", "k", "n"),
    [
        ("int4", 512, 57344, 1024),
        ("nf4", 512, 8192, 4096),
        ("fp8", 512, 57344, 1024),
        ("mxfp8", 512, 57344, 1024),
        ("int1", 512, 57344, 1024),
        ("attention:512:1536:112", 512, 14336, 0),
        ("attention:512:1536:8", 512, 8192, 0),
        ("attention:1:4096:112", 1, 14336, 0),
        # Many short sequences at once, and one key head for all queries.
        ("attention:1:1:112", 512, 14336, 0),
        ("attention:16:16:112", 512, 14336, 0),
        ("attention:512:1024:1", 512, 8192, 0),
        ("quantise", 512, 57344, 0),
        ("rms_norm", 512, 57344, 0),
    ],
)
def test_temporaries_stay_below_64_mib(kernel: str, rows: int, k: int, n: int) -> None:
    command = [sys.executable, "-c", _TEMPORARIES, kernel, str(rows), str(k), str(max(n, 1))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) * 1024 <= 64 << 20
