"""Attention over keys and values of one run."""

from __future__ import annotations

import torch
from torch import Tensor

from memladder.kernels.naive.blocks import ROWS, TILE, blocks

KEYS = 256
"""Keys at a time."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    sequences: int,
    heads: int,
    kv_heads: int,
    slopes: Tensor | None = None,
    exact: bool = False,
) -> None:
    """Causal softmax(q · kᵀ / √d) · v; the scores exist for one tile at a time.

    query, out [sequences · queries, heads · d], may be the same; key, value [sequences · keys,
    kv_heads · d]. The queries are the last of the keys' tokens: query i of a sequence sees the keys
    up to keys − queries + i. Head h reads key and value head h · kv_heads / heads. With `slopes`
    float32 [heads] ALiBi is added. Online softmax: Milakov and Gimelshein 2018.

    Tensor cores multiply float16: without `exact` a kernel may round the softmax's weights to it.
    Nothing is rounded here.
    """
    del exact
    _attend(query, key, value, out, sequences, heads, kv_heads, slopes=slopes)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    sequences: int,
    heads: int,
    kv_heads: int,
    window: int = 0,
    softcap: float = 0.0,
    exact: bool = False,
) -> None:
    """`attention` in which a token sees the last `window` tokens only, itself among them (Beltagy
    et al. 2020), and scores are softcap · tanh(score / softcap) (Gemma Team 2024); 0 is without.
    """
    del exact
    _attend(query, key, value, out, sequences, heads, kv_heads, window=window, softcap=softcap)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sequences: int,
    heads: int,
    kv_heads: int,
    *,
    slopes: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    d = query.shape[1] // heads
    group = heads // kv_heads
    keys = key.shape[0] // sequences
    queries = query.shape[0] // sequences
    # [sequences, kv_heads, group, queries, d] and [sequences, kv_heads, keys, d]
    q, o = (x.view(sequences, queries, kv_heads, group, d).permute(0, 2, 3, 1, 4)
            for x in (query, out))  # fmt: skip
    k, v = (x.view(sequences, keys, kv_heads, d).transpose(1, 2) for x in (key, value))
    # Of queries, scores, keys and values, none is wider than a tile of the widest.
    widest = max(d, min(keys, KEYS))
    rows = max(1, min(queries, ROWS, TILE // (group * widest)))
    heads_at_once = max(1, TILE // max(group * rows * widest, min(keys, KEYS) * d))
    sequences_at_once = max(1, heads_at_once // kv_heads)
    for s in blocks(sequences, sequences_at_once):
        for h in blocks(kv_heads, heads_at_once):
            slope = None if slopes is None else slopes.view(kv_heads, group, 1, 1)[h]
            for r in blocks(queries, rows):
                tile = q[s, h, :, r].float()
                positions = torch.arange(r.start, r.stop, device=query.device) + keys - queries
                tile = tile.mul_(d**-0.5)
                o[s, h, :, r] = attended(tile, k[s, h], v[s, h], positions, slope, window, softcap)


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slope: Tensor | None,
    window: int,
    softcap: float,
) -> Tensor:
    """One tile of queries [sequences, heads, group, rows, d] over all keys that it may see."""
    *outer, group, rows, d = q.shape
    q = q.reshape(*outer, group * rows, d)
    # Finite: a block may hold no key that a query sees.
    lowest = torch.finfo(torch.float32).min
    most = torch.full((*outer, group, rows, 1), lowest, device=q.device)
    total = torch.zeros_like(most)
    sums = torch.zeros(*outer, group, rows, d, device=q.device)
    for c in blocks(int(positions[-1]) + 1, KEYS):
        distance = torch.arange(c.start, c.stop, device=q.device) - positions.unsqueeze(1)
        scores = (q @ k[..., c, :].float().transpose(-1, -2)).view(*outer, group, rows, -1)
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if slope is not None:
            scores += slope * distance
        if window:
            scores.masked_fill_(distance <= -window, -torch.inf)
        if c.stop > int(positions[0]) + 1:
            scores.masked_fill_(distance > 0, -torch.inf)
        new = torch.maximum(most, scores.amax(dim=-1, keepdim=True))
        scores = scores.sub_(new).exp_()
        old = (most - new).exp_()
        total = total.mul_(old).add_(scores.sum(dim=-1, keepdim=True))
        scores = scores.view(*outer, group * rows, -1)
        sums = sums.mul_(old).add_((scores @ v[..., c, :].float()).view_as(sums))
        most = new
    return sums.div_(total)
