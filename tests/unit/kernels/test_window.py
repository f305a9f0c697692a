"""Attention with a window and with a soft cap: naive against float64, Triton against naive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memladder.kernels import cuda, naive
from tests.unit.kernels.test_cuda import error, normal, poisoned, run


def defined(
    query: Tensor, key: Tensor, value: Tensor, kv_heads: int, window: int, softcap: float
) -> Tensor:
    """One sequence in float64: query [queries, heads, d], key, value [keys, kv_heads, d]."""
    queries, heads, d = query.shape
    keys = len(key)
    found = torch.empty(query.shape, dtype=torch.float64)
    for head in range(heads):
        k, v = (x[:, head * kv_heads // heads].double() for x in (key, value))
        for i in range(queries):
            last = keys - queries + i
            first = max(0, last - window + 1) if window else 0
            scores = k[first : last + 1] @ query[i, head].double() * d**-0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            found[i, head] = scores.softmax(0) @ v[first : last + 1]
    return found


CASES = [
    # Queries, keys, heads, heads of keys, size of a head, window, soft cap.
    (5, 5, 2, 1, 16, 3, 0.0),
    (70, 70, 4, 2, 16, 7, 0.0),
    (33, 300, 2, 2, 24, 40, 5.0),
    (1, 130, 2, 1, 16, 64, 0.0),
    (40, 40, 2, 1, 16, 0, 2.0),
    (17, 600, 1, 1, 16, 300, 0.0),
]


@pytest.mark.parametrize(("queries", "keys", "heads", "kv_heads", "d", "window", "softcap"), CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_windows_and_soft_caps(
    queries: int, keys: int, heads: int, kv_heads: int, d: int, window: int, softcap: float,
    exact: bool,
) -> None:  # fmt: skip
    sequences = 2
    query = normal(sequences * queries, heads * d).half()
    key, value = (normal(sequences * keys, kv_heads * d, seed=i).half() for i in (1, 2))
    options = {"sequences": sequences, "heads": heads, "kv_heads": kv_heads, "exact": exact}
    options |= {"window": window, "softcap": softcap}
    expected, found = poisoned(*query.shape), poisoned(*query.shape)
    naive.windowed_attention(query, key, value, expected, **options)
    by_definition = [
        defined(
            query[s * queries : (s + 1) * queries].view(queries, heads, d),
            key[s * keys : (s + 1) * keys].view(keys, kv_heads, d),
            value[s * keys : (s + 1) * keys].view(keys, kv_heads, d),
            kv_heads, window, softcap,
        )
        for s in range(sequences)
    ]  # fmt: skip
    assert error(expected, torch.cat(by_definition).flatten(1)) < 5e-4
    run(cuda.windowed_attention, query, key, value, found, **options)
    assert error(found, expected) < 1e-3
    # Over the queries themselves.
    run(cuda.windowed_attention, query, key, value, query, **options)
    assert torch.equal(query, found)
