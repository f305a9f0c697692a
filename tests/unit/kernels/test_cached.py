"""The key-value cache's kernels: naive against float64, Triton against naive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memladder import formats
from memladder.engine.program.cache import FEW
from memladder.formats._shared.base import Quantised
from memladder.kernels import cuda, naive
from tests.unit.kernels.test_cuda import error, normal, poisoned, run
from tests.unit.kernels.test_window import defined


class Cache:
    """A poisoned cache of some slots, and what it should hold, token by token, in float64."""

    def __init__(self, slots: int, kv_heads: int, d: int, capacity: int, format: str) -> None:
        self.kv_heads, self.d, self.capacity = kv_heads, d, capacity
        self.format = format
        rows = slots * kv_heads * capacity
        dtype = torch.float16 if format == "fp16" else torch.uint8
        poison = torch.full((2, rows, d * dtype.itemsize), 255, dtype=torch.uint8)
        self.keys, self.values = poison.view(dtype)
        self.scales: dict[str, Tensor] = {}
        if format != "fp16":
            both = torch.full((2, rows, 1), torch.nan)
            self.scales = {"key_scales": both[0], "value_scales": both[1]}

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    @property
    def options(self) -> dict[str, Any]:
        sizes = {"kv_heads": self.kv_heads, "capacity": self.capacity, "format": self.format}
        return sizes | self.scales

    def copy(self) -> Cache:
        other = Cache.__new__(Cache)
        other.__dict__ = {**self.__dict__, "keys": self.keys.clone(), "values": self.values.clone()}
        other.scales = {name: part.clone() for name, part in self.scales.items()}
        return other

    def tokens(self, slot: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, kv_heads, d] of a slot, as they are read."""
        found = []
        for held, name in zip(self.held, ("key_scales", "value_scales"), strict=True):
            kind = formats.get(self.format)
            numbers = (
                kind.dequantise(Quantised(held, self.scales[name])) if self.scales else held.float()
            )
            own = numbers.view(-1, self.kv_heads, self.capacity, self.d)[slot]
            place = torch.arange(first, stop) % self.capacity
            found.append(own[:, place].transpose(0, 1))
        return found[0], found[1]

    def fill(self, slot: int, tokens: int, seed: int) -> None:
        """By the naive kernel, as many tokens at a time as a ring bears."""
        key, value = (normal(tokens, self.kv_heads * self.d, seed=seed + i).half() for i in (0, 1))
        for at in range(0, tokens, self.capacity):
            part = slice(at, min(at + self.capacity, tokens))
            positions = places((slot, at, part.stop - at))
            naive.cache_append(
                key[part], value[part], positions, *self.held, start=0, **self.options
            )


def places(*rows: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def frequencies(d: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, d, 2) / d)


@pytest.mark.parametrize("format", ["fp16", "fp8", "int8"])
@pytest.mark.parametrize(
    ("kv_heads", "d", "rows", "start"), [(1, 16, 5, 0), (3, 24, 3, 2), (9, 64, 1, 0)]
)
@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_appended(
    format: str, kv_heads: int, d: int, rows: int, start: int, rotated: bool
) -> None:
    group, capacity = 2, 20
    # The second sequence goes round the ring, the third has fewer new tokens than rows, or none.
    positions = places((2, 7, rows + start), (0, 38, rows + start), (1, 0, start + rows // 2))
    key, value = (normal(3 * rows, kv_heads * d, seed=i).half() for i in (1, 2))
    key[0] = 0
    query = normal(3 * rows, group * kv_heads * d, seed=3).half()
    cache = Cache(3, kv_heads, d, capacity, format)
    twin = cache.copy()
    options: dict[str, Any] = {"start": start}
    if rotated:
        options |= {"query": query, "frequencies": frequencies(d)}
    turned, also = poisoned(*query.shape), poisoned(*query.shape)
    given = {"turned": turned} if rotated else {}
    naive.cache_append(key, value, positions, *cache.held, **cache.options, **options, **given)
    given = {"turned": also} if rotated else {}
    run(cuda.cache_append, key, value, positions, *twin.held, **twin.options, **options, **given)
    # Token by token, and nothing else.
    touched = torch.zeros(3, kv_heads, capacity, dtype=torch.bool)
    for sequence, (slot, past, new) in enumerate(positions.tolist()):
        for index in range(start, min(new, start + rows)):
            place, row = (past + index) % capacity, sequence * rows + index - start
            touched[slot, :, place] = True
            expected = key[row].view(kv_heads, d).double()
            if rotated:
                expected = turn(expected, past + index)
            found = cache.tokens(slot, place, place + 1)
            bound = {"fp16": 1e-3, "fp8": 6e-2, "int8": 2e-2}[format]
            if expected.any():
                assert error(found[0][0], expected) < bound
            assert error(found[1][0], value[row].view(kv_heads, d)) < bound
    untouched = cache.keys.view(torch.uint8)[~touched.flatten()]
    assert (untouched == 255).all()
    if rotated:
        for sequence, (_, past, _) in enumerate(positions.tolist()):
            for index in range(rows):
                row = sequence * rows + index
                expected = turn(query[row].view(-1, d).double(), past + start + index)
                assert error(turned[row].view(-1, d), expected) < 1e-3
        assert error(also, turned) < 1e-4
    # Sines differ in their last bit; what is not rotated is equal code by code.
    pairs = [(twin.values, cache.values)]
    if rotated:
        found, expected = (
            torch.cat([one.tokens(slot, 0, capacity)[0] for slot in range(3)])
            for one in (twin, cache)
        )
        there = expected.isfinite()
        assert torch.equal(there, found.isfinite())
        bound = 5e-4 if format == "fp16" else 6e-3
        rest = (found - expected)[there].norm()
        assert rest <= bound * expected[there].norm()
    else:
        pairs.append((twin.keys, cache.keys))
    pairs += [(twin.scales[name], scales) for name, scales in cache.scales.items() if not rotated]
    for mine, other in pairs:
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


def turn(heads: Tensor, position: int) -> Tensor:
    """[heads, d] in float64, in the order of halves."""
    low, high = heads.chunk(2, dim=1)
    angle = position * frequencies(heads.shape[1]).double()
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1)


@pytest.mark.parametrize("start", [0, 3])
def test_rotation_at_positions_that_are_read(start: int) -> None:
    x = normal(6, 3 * 32).half()
    positions = places((5, 70, 3), (1, 4000, 1))
    found, expected = poisoned(*x.shape), poisoned(*x.shape)
    numbers = frequencies(32)
    naive.rotary_at(x, numbers, positions, expected, head_dim=32, start=start)
    for row in range(6):
        position = (70, 4000)[row // 3] + start + row % 3
        by_definition = turn(x[row].view(3, 32).double(), position)
        assert error(expected[row].view(3, 32), by_definition) < 1e-3
    run(cuda.rotary_at, x, numbers, positions, found, head_dim=32, start=start)
    assert error(found, expected) < 2e-4


CASES = [
    # Rows, sequences (slot, past, new), heads, heads of keys, size of a head, tokens held.
    (1, [(1, 40, 1)], 2, 1, 16, 64),
    (1, [(0, 333, 1), (2, 0, 1), (1, 64, 0), (3, 63, 1)], 4, 2, 16, 400),
    (3, [(0, 65, 3), (1, 129, 2)], 6, 2, 80, 150),
    (16, [(1, 130, 15)], 2, 2, 24, 300),
    (33, [(0, 7, 33), (2, 0, 20)], 2, 1, 16, 64),
    (70, [(0, 0, 70)], 2, 1, 32, 70),
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"slopes": True},
    "window": {"window": 40},
    "softcap": {"softcap": 3.0},
    "window and softcap": {"window": 9, "softcap": 5.0},
}


# The interpreter takes its time: of each a few here, all of them among the slow tests.
OFTEN = {(0, "alibi", "fp16"), (1, "plain", "fp16"), (2, "softcap", "fp8"), (3, "alibi", "int8")}
OFTEN |= {(4, "window and softcap", "fp16"), (5, "alibi", "fp16"), (2, "window", "fp16")}
EVERY = [
    pytest.param(
        *CASES[case],
        kind,
        format,
        id=f"{case}-{kind}-{format}",
        marks=[] if (case, kind, format) in OFTEN else pytest.mark.slow,
    )
    for case in range(len(CASES))
    for kind in KINDS
    for format in ("fp16", "fp8", "int8")
]


@pytest.mark.parametrize(
    ("rows", "sequences", "heads", "kv_heads", "d", "capacity", "kind", "format"), EVERY
)
def test_attention_over_what_is_held(
    rows: int,
    sequences: list[tuple[int, int, int]],
    heads: int,
    kv_heads: int,
    d: int,
    capacity: int,
    kind: str,
    format: str,
) -> None:
    extra = dict(KINDS[kind])
    if "window" in extra:
        # A ring.
        capacity = min(capacity, -(-(extra["window"] + rows) // 128) * 128)
    cache = Cache(4, kv_heads, d, capacity, format)
    for slot, past, new in sequences:
        cache.fill(slot, past + new, seed=slot + 1)
    if "slopes" in extra:
        extra["slopes"] = 2.0 ** -torch.arange(1.0, heads + 1)
    query = normal(len(sequences) * rows, heads * d, seed=9).half()
    query *= 2
    for number, (_, _, new) in enumerate(sequences):
        query[number * rows + new : (number + 1) * rows] = torch.nan
    positions = places(*sequences)
    options = cache.options | extra | {"heads": heads, "start": 0}
    expected = poisoned(*query.shape)
    naive.cached_attention(query, *cache.held, positions, expected, **options)
    for number, (slot, past, new) in enumerate(sequences):
        own = expected[number * rows : (number + 1) * rows]
        assert not own[new:].any()
        if new:
            first = max(0, past + new - capacity) if "window" in extra else 0
            mine = query[number * rows :][:new].view(new, heads, d)
            by_definition = attended(mine, *cache.tokens(slot, first, past + new), extra)
            assert error(own[:new], by_definition.flatten(1)) < 5e-4
    # Of more rows a past is never divided.
    for parts in (0, 3) if rows <= FEW else (0,):
        options["exact"] = parts > 0
        found = poisoned(*query.shape)
        if parts:
            options["partial"] = torch.full((len(query) * heads * parts, d + 2), torch.nan)
        run(cuda.cached_attention, query, *cache.held, positions, found, **options)
        assert error(found, expected) < (6e-4 if parts else 2e-3), parts
    # Over the queries themselves, and twice the same.
    run(cuda.cached_attention, query, *cache.held, positions, query, **options)
    assert torch.equal(query, found)


def attended(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
    """By definition, in float64: query [queries, heads, d], key, value [keys, kv_heads, d]."""
    if "slopes" not in extra:
        window, softcap = extra.get("window", 0), extra.get("softcap", 0.0)
        return defined(query, key, value, key.shape[1], window, softcap)
    found = torch.empty(query.shape, dtype=torch.float64)
    queries, heads, d = query.shape
    for head in range(heads):
        k, v = (x[:, head * key.shape[1] // heads].double() for x in (key, value))
        for i in range(queries):
            last = len(key) - queries + i
            scores = k[: last + 1] @ query[i, head].double() * d**-0.5
            scores += extra["slopes"][head].double() * (torch.arange(last + 1) - last)
            found[i, head] = scores.softmax(0) @ v[: last + 1]
    return found


def test_neighbours_do_not_matter() -> None:
    # Bit by bit: alone, and among sequences of other lengths.
    cache = Cache(4, 2, 16, 400, "fp16")
    lengths = (333, 17, 399, 65)
    for slot, length in enumerate(lengths):
        cache.fill(slot, length, seed=slot)
    options = cache.options | {"heads": 4, "start": 0}
    query = normal(4, 64).half()
    together = poisoned(4, 64)
    rows = [(slot, length - 1, 1) for slot, length in enumerate(lengths)]
    partial = torch.empty(4 * 4 * 6, 18)
    run(
        cuda.cached_attention, query, *cache.held, places(*rows), together,
        partial=partial, **options,
    )  # fmt: skip
    for i, row in enumerate(rows):
        alone = poisoned(1, 64)
        run(
            cuda.cached_attention, query[i : i + 1], *cache.held, places(row), alone,
            partial=partial[:24], **options,
        )  # fmt: skip
        assert torch.equal(alone[0], together[i])


def test_what_was_new_has_been() -> None:
    positions = places((3, 7, 1), (0, 0, 0), (1, 70, 5))
    twin = positions.clone()
    naive.advance(positions)
    assert positions.tolist() == [[3, 8, 1], [0, 0, 0], [1, 75, 5]]
    run(cuda.advance, twin)
    assert torch.equal(twin, positions)
