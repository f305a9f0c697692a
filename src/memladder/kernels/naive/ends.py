"""What stands before a model's first layer and after its last, and the choice of the next token:
the plain twins.

`ids` are int32 [rows, 1], a row a token. `positions` int32 [sequences, 3] as in `cached`: of each
sequence its slot, how many tokens it has had, how many of its rows are new; matrices that stand
beside it have `queries` rows a sequence, of which row i is the sequence's new token `start` + i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memladder.kernels.naive.blocks import TILE, blocks
from memladder.kernels.packed import PackedMatrix


def embed(
    ids: Tensor,
    weight: PackedMatrix,
    out: Tensor,
    *,
    factor: float = 1.0,
    numbers: Tensor | None = None,
) -> None:
    """out = factor · the rows `ids` of a table in any format.

    ids int32 [rows, 1], each one of the table's rows; weight [vocabulary, columns]; out float16
    [rows, columns]. `numbers` float32 [2^bits] is what each code of a format below 16 bits stands
    for (`Format.decode`): what a kernel looks up; here the format itself is asked.
    """
    del numbers
    tile_rows = weight.layout.tile_rows
    for part in blocks(len(ids), max(1, TILE // weight.columns)):
        wanted = ids[part, 0].tolist()
        rows = [
            weight.format.dequantise(weight.tiles(i // tile_rows, 1, 0, weight.layout.shape[1]))[
                i % tile_rows
            ]
            for i in wanted
        ]
        out[part] = torch.stack(rows).mul_(factor)


def add_positions(
    x: Tensor, table: Tensor, positions: Tensor, out: Tensor, *, start: int, offset: int
) -> None:
    """out = x + the table's rows of the tokens' positions, `offset` further down.

    x, out float16 [sequences · queries, columns], may be the same; table float16 [rows · columns],
    one row after the other. Rows of padding get what they had.
    """
    columns = x.shape[1]
    queries = len(x) // len(positions)
    held = table.view(-1, columns)
    for s, (_, past, new) in enumerate(positions.tolist()):
        count = min(max(new - start, 0), queries)
        own = slice(s * queries, s * queries + count)
        first = past + start + offset
        out[own] = x[own].float() + held[first : first + count].float()
        padding = slice(own.stop, (s + 1) * queries)
        out[padding] = x[padding]


def last_rows(x: Tensor, positions: Tensor, out: Tensor) -> None:
    """out = each sequence's last new token: x [sequences · queries, columns], all of them from
    the first new one on; out [sequences, columns]. A sequence without new tokens gets row 0."""
    queries = len(x) // len(positions)
    last = (positions[:, 2] - 1).clamp(0, queries - 1).long()
    out.copy_(x.view(len(positions), queries, -1)[torch.arange(len(positions)), last])


def cap_logits(x: Tensor, out: Tensor, *, factor: float, softcap: float) -> None:
    """out = softcap · tanh(factor · x / softcap); without the tanh where softcap is 0.

    x, out float32 [rows, vocabulary], may be the same.
    """
    scaled = x * factor
    out.copy_(softcap * torch.tanh(scaled / softcap) if softcap else scaled)


def choose_largest(logits: Tensor, ids: Tensor) -> None:
    """ids = where each row's largest number is, the first of equal ones; `vocabulary`, which is no
    id, for a row that holds NaN.

    logits float32 [rows, vocabulary]; ids int32 [rows, 1].
    """
    # On ties torch.argmax names any of them.
    most = logits.amax(dim=1, keepdim=True)
    first = (logits == most).to(torch.uint8).argmax(dim=1)
    ids[:, 0] = torch.where(most[:, 0].isnan(), logits.shape[1], first)
