"""Keys and values that outlive a run: kernels that append to them, and that attend to them.

The cache of a layer is two matrices, `keys` and `values` [slots · kv_heads · capacity, d]: a slot a
sequence, the tokens of a head one after the other, token t at t mod capacity (a ring where a window
is all that is seen). They are float16, or codes of a format whose scales, float32 [slots · kv_heads
· capacity, 1], are a head's and token's.

`positions` int32 [sequences, 3]: a row for each sequence of the operands: its slot, how many tokens
it has had before, how many of its rows are new tokens. Rows beyond these are padding: they are not
appended, and what attention gives for them is zero. Operands hold `queries` rows a sequence, of
which row i is the sequence's new token `start` + i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memladder import formats
from memladder.formats._shared.base import Quantised
from memladder.kernels.naive.attention import KEYS, attended
from memladder.kernels.naive.blocks import ROWS, TILE, blocks, row_blocks
from memladder.kernels.naive.rows import rotated


def rotary_at(
    x: Tensor, frequencies: Tensor, positions: Tensor, out: Tensor, *, head_dim: int, start: int
) -> None:
    """`rotary` at the positions that the tokens have.

    x, out [sequences · queries, heads · head_dim], may be the same; frequencies float32
    [head_dim / 2].
    """
    places = _places(positions, len(x), start)
    for part in row_blocks(x):
        heads = x[part].float().view(part.stop - part.start, -1, head_dim)
        out[part] = rotated(heads, places[part], frequencies).flatten(1)


def cache_append(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    kv_heads: int,
    capacity: int,
    start: int,
    format: str = "fp16",
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    frequencies: Tensor | None = None,
    query: Tensor | None = None,
    turned: Tensor | None = None,
) -> None:
    """The new tokens' keys and values into the cache, in its `format`.

    key, value [sequences · queries, kv_heads · d]. With `frequencies` keys are rotated as by
    `rotary_at`, and rounded to float16, before; and so are the queries, from `query` into `turned`
    [sequences · queries, heads · d], which may be the same.
    """
    d = keys.shape[1]
    if frequencies is not None and query is not None and turned is not None:
        rotary_at(query, frequencies, positions, turned, head_dim=d, start=start)
    queries = len(key) // len(positions)
    head = torch.arange(kv_heads, device=key.device) * capacity
    for s, (slot, past, new) in enumerate(positions.tolist()):
        own = slice(s * queries, s * queries + min(max(new - start, 0), queries))
        for part in row_blocks(key[own]):
            token = torch.arange(part.start, part.stop, device=key.device) + past + start
            # [rows, kv_heads]
            place = slot * kv_heads * capacity + head + token.remainder(capacity).unsqueeze(1)
            for x, held, scales in ((key, keys, key_scales), (value, values, value_scales)):
                rows = x[own][part].view(len(token), kv_heads, d)
                if frequencies is not None and x is key:
                    rows = rotated(rows.float(), token, frequencies).half()
                _hold(rows.view(-1, d), held, scales, place.flatten(), format)


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    heads: int,
    kv_heads: int,
    capacity: int,
    start: int,
    slopes: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    format: str = "fp16",
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    exact: bool = False,
    partial: Tensor | None = None,
) -> None:
    """Causal softmax(q · kᵀ / √d) · v over what the cache holds, the new tokens among it.

    query, out [sequences · queries, heads · d], may be the same. Slopes, `window`, `softcap` and
    `exact` as in `attention` and `windowed_attention`; the ring holds at least the window's tokens
    before the first of the new ones.

    `partial` float32 [sequences · queries · heads · splits, d + 2]: where a kernel that has few
    queries may keep sums over parts of the past, before it adds them in the order of the past. What
    it holds afterwards is nobody's business, and here nothing.
    """
    del exact, partial
    d = keys.shape[1]
    queries, group = len(query) // len(positions), heads // kv_heads
    for s, (slot, past, new) in enumerate(positions.tolist()):
        count = min(max(new - start, 0), queries)
        own = slice(s * queries, s * queries + count)
        out[own.stop : (s + 1) * queries] = 0
        if not count:
            continue
        stop = past + start + count
        first = max(0, stop - count - window + 1) if window else 0
        token = torch.arange(first, stop, device=query.device).remainder_(capacity)
        # [kv_heads, group, count, d]
        q, o = (x[own].view(count, kv_heads, group, d).permute(1, 2, 0, 3) for x in (query, out))
        for h in blocks(kv_heads, max(1, TILE // ((stop - first) * d))):
            head = torch.arange(h.start, h.stop, device=query.device) + slot * kv_heads
            place = (head.unsqueeze(1) * capacity + token).flatten()
            k, v = (
                _taken(held, scales, place, format).view(h.stop - h.start, -1, d)
                for held, scales in ((keys, key_scales), (values, value_scales))
            )
            slope = None if slopes is None else slopes.view(kv_heads, group, 1, 1)[h]
            widest = max(d, min(stop - first, KEYS))
            for r in blocks(count, max(1, min(ROWS, TILE // (group * widest)))):
                at = torch.arange(r.start, r.stop, device=query.device) + stop - count - first
                tile = q[h, :, r].float().mul_(d**-0.5)
                o[h, :, r] = attended(tile, k, v, at, slope, window, softcap)


def advance(positions: Tensor) -> None:
    """What was new has been before: positions int32 [sequences, 3], for the next run."""
    positions[:, 1] += positions[:, 2]


def _places(positions: Tensor, rows: int, start: int) -> Tensor:
    """Positions [rows] of the operands' tokens."""
    row = torch.arange(rows // len(positions), device=positions.device) + start
    return (positions[:, 1].unsqueeze(1) + row).flatten()


def _hold(rows: Tensor, held: Tensor, scales: Tensor | None, place: Tensor, format: str) -> None:
    if scales is None:
        held[place] = rows
        return
    found = formats.get(format).quantise(rows)
    assert found.scales is not None
    held[place], scales[place] = found.codes, found.scales


def _taken(held: Tensor, scales: Tensor | None, place: Tensor, format: str) -> Tensor:
    if scales is None:
        return held[place]
    return formats.get(format).dequantise(Quantised(held[place], scales[place]))
