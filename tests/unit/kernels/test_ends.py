"""Embeddings, positions, logits, choices: naive against definitions, Triton against naive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memladder import formats
from memladder.kernels import cuda, naive
from memladder.kernels.packed import PackedMatrix
from tests.unit.kernels.test_cuda import normal, poisoned, run

KERNELS = pytest.mark.parametrize("kernels", [naive, cuda], ids=["naive", "triton"])
FORMATS = [
    *("fp16", "fp8", "fp8:element=e5m2", "mxfp8", "int8", "nf4", "mxfp4", "int2", "int1"),
    *("int4", "int4:zero_point=true", "int4:group_size=32"),
]


@KERNELS
@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(97, 80), (130, 1100)])
def test_embed(kernels: object, spec: str, rows: int, columns: int) -> None:
    kind = formats.get(spec)
    matrix = PackedMatrix.pack(kind, kind.quantise(normal(rows, columns) * 0.05))
    ids = torch.tensor([[rows - 1], [0], [65], [64], [rows - 1]], dtype=torch.int32)
    found = poisoned(5, columns)
    numbers = None
    if kind.bits < 16:
        codes = torch.arange(1 << kind.bits, dtype=torch.uint8).unsqueeze(0)
        numbers = kind.decode(codes).flatten().contiguous()
    run(kernels.embed, ids, matrix, found, factor=3.0, numbers=numbers)  # type: ignore[attr-defined]
    expected = (matrix.dequantise()[ids[:, 0].long()] * 3.0).half()
    assert torch.equal(found, expected)


@KERNELS
@pytest.mark.parametrize("start", [0, 2])
def test_add_positions(kernels: object, start: int) -> None:
    x, table = normal(15, 80).half(), normal(40, 80, seed=1).half()
    # Slot, past, new: the second is idle, the third has three rows of padding.
    positions = torch.tensor([[0, 3, 7], [2, 9, 0], [1, 30, 4]], dtype=torch.int32)
    expected = x.clone()
    for sequence, (_, past, new) in enumerate(positions.tolist()):
        for query in range(min(5, max(new - start, 0))):
            row = 5 * sequence + query
            own = table[past + start + query + 2].float()
            expected[row] = (x[row].float() + own).half()
    found = x.clone()
    add = kernels.add_positions  # type: ignore[attr-defined]
    run(add, found, table.flatten(), positions, found, start=start, offset=2)
    assert torch.equal(found, expected)


@KERNELS
def test_last_rows(kernels: object) -> None:
    x = normal(15, 333).half()
    positions = torch.tensor([[0, 3, 5], [2, 9, 0], [1, 30, 2]], dtype=torch.int32)
    found = poisoned(3, 333)
    run(kernels.last_rows, x, positions, found)  # type: ignore[attr-defined]
    assert torch.equal(found, x[[4, 5, 11]])


@KERNELS
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_cap_logits(kernels: object, softcap: float) -> None:
    x = normal(3, 1999) * 40
    found = x.clone()
    run(kernels.cap_logits, found, found, factor=0.25, softcap=softcap)  # type: ignore[attr-defined]
    wanted = x.double() * 0.25
    wanted = softcap * torch.tanh(wanted / softcap) if softcap else wanted
    # A tanh by way of the logistic function errs by a last bit of 1.
    atol = 1e-6 + softcap * 2**-22
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=atol)


@KERNELS
@pytest.mark.parametrize("columns", [5, 20011])
def test_choose_largest(kernels: object, columns: int) -> None:
    logits = normal(4, columns) * 20
    logits[1, 2] = logits[1, columns - 1] = 99.0
    logits[2] = -torch.inf
    logits[2, 3] = -1e30
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert first[1:3] == [2, 3]
    # No id is right for a row with NaN, however large others are.
    logits[3, columns // 2] = torch.nan
    found = torch.full((4, 1), -1, dtype=torch.int32)
    run(kernels.choose_largest, logits, found)  # type: ignore[attr-defined]
    assert found.flatten().tolist() == [*first[:3], columns]


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("spec", ["fp16", "int4"])
def test_products_of_float32(rows: int, spec: str) -> None:
    """Logits: float16 has no more than 11 bits to tell two of them apart."""
    kind = formats.get(spec)
    weight = PackedMatrix.pack(kind, kind.quantise(normal(97, 128) * 0.1))
    x = normal(rows, 128, seed=1).half()
    expected = x.double() @ weight.dequantise().double().t()
    found: list[Tensor] = []
    for kernels in (naive, cuda):
        out = torch.full((rows, 97), torch.nan)
        run(kernels.matmul, x, weight, out)
        found.append(out)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-5)
    # Weights are unpacked to float16 there.
    atol = 1e-5 if spec == "fp16" else 5e-3
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-6, atol=atol)
