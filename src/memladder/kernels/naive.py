"""The plain PyTorch twin of every kernel: float32 inside, tile by tile, written to be checked.

All activations are matrices [rows, columns], a row a token, float16 or codes of a format. An output
may be the same memory as the operand that its docstring names. Besides their arguments the kernels
need a few tiles of `_TILE` elements, never more than 64 MiB, whatever the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from memladder import formats
from memladder.formats.base import Format, Quantised
from memladder.kernels.packed import PackedMatrix

# float32: 4 MiB. A kernel holds a few of them at a time.
_TILE = 1 << 20
_ROWS = 512
_WEIGHT_ROWS = 512
_WEIGHT_COLUMNS = 2048
_KEYS = 256

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "silu": lambda x: functional.silu(x, inplace=True),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu_,
}

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    **{name: function for name, function in ACTIVATIONS.items() if name},
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: torch.relu(x).square(),
    "plus": torch.add,
    "scale": torch.mul,
    "clip": torch.clamp,
    "add": torch.add,
    "mul": torch.mul,
}
"""What `pointwise` computes: of an element, and of a number or two or another element."""


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """out = x / √(mean(x²) + eps) · weight, row by row (Zhang and Sennrich 2019).

    x, out [rows, columns], may be the same; weight [columns].
    """
    for part in _row_blocks(x):
        values = x[part].float()
        values *= torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
        out[part] = values.mul_(weight.float())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> None:
    """out = (x − mean(x)) / √(var(x) + eps) · weight + bias, row by row (Ba et al. 2016).

    x, out [rows, columns], may be the same; weight, bias [columns].
    """
    for part in _row_blocks(x):
        values = x[part].float()
        values -= values.mean(dim=1, keepdim=True)
        values *= torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
        out[part] = values.mul_(weight.float()).add_(bias.float())


def rms_norm_heads(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """`rms_norm` of every head: x, out [rows, heads · d], may be the same; weight [d]."""
    rms_norm(x.view(-1, len(weight)), weight, out.view(-1, len(weight)), eps=eps)


def layer_norm_heads(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> None:
    """`layer_norm` of every head: x, out [rows, heads · d], may be the same; weight, bias [d]."""
    layer_norm(x.view(-1, len(weight)), weight, bias, out.view(-1, len(weight)), eps=eps)


def pointwise(
    x: Tensor,
    out: Tensor,
    *,
    function: str,
    other: Tensor | None = None,
    number: float = 0.0,
    most: float = 0.0,
) -> None:
    """out = function(x), or of x and `other`, or of x and `number` (clip: and `most`).

    x, other, out [rows, columns], may be the same. `function` is one of `FUNCTIONS`.
    """
    numbers = {"plus": (number,), "scale": (number,), "clip": (number, most)}.get(function, ())
    for part in _row_blocks(x):
        operands = [x[part].float()] if other is None else [x[part].float(), other[part].float()]
        out[part] = FUNCTIONS[function](*operands, *numbers)


def quantise(x: Tensor, codes: Tensor, scales: Tensor, *, format: str) -> None:
    """The rows of x [rows, columns] in an activation format: codes [rows, columns], uint8, or
    float16 for the numbers that they stand for; scales [rows, groups]."""
    kind = formats.get(format)
    for part in _row_blocks(x):
        found = kind.quantise(x[part])
        assert found.scales is not None
        wide = codes.dtype == torch.float16
        codes[part] = kind.decode(found.codes) if wide else found.codes
        scales[part] = found.scales


def rotary(
    x: Tensor, frequencies: Tensor, out: Tensor, *, head_dim: int, start: int, seq_len: int
) -> None:
    """Rotate every head by its token's position (Su et al. 2021, in the order of halves: element i
    is paired with i + head_dim / 2).

    x, out [rows, heads · head_dim], may be the same; frequencies float32 [head_dim / 2], radians a
    position. Row i has position (start + i) mod seq_len.
    """
    for part in _row_blocks(x):
        positions = torch.arange(part.start, part.stop, device=x.device)
        positions = positions.add_(start).remainder_(seq_len)
        heads = x[part].float().view(part.stop - part.start, -1, head_dim)
        out[part] = _rotated(heads, positions, frequencies).flatten(1)


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
    widest = max(d, min(keys, _KEYS))
    rows = max(1, min(queries, _ROWS, _TILE // (group * widest)))
    heads_at_once = max(1, _TILE // max(group * rows * widest, min(keys, _KEYS) * d))
    sequences_at_once = max(1, heads_at_once // kv_heads)
    for s in _blocks(sequences, sequences_at_once):
        for h in _blocks(kv_heads, heads_at_once):
            slope = None if slopes is None else slopes.view(kv_heads, group, 1, 1)[h]
            for r in _blocks(queries, rows):
                tile = q[s, h, :, r].float()
                positions = torch.arange(r.start, r.stop, device=query.device) + keys - queries
                tile = tile.mul_(d**-0.5)
                o[s, h, :, r] = _attended(tile, k[s, h], v[s, h], positions, slope, window, softcap)


def matmul(
    x: Tensor,
    weight: PackedMatrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    format: str = "fp16",
    activation: str = "",
    residual: Tensor | None = None,
) -> None:
    """out = activation(x · Wᵀ + bias) + residual.

    x [rows, K]: float16, or with `scales` what `quantise` made of it in `format`. weight [N, K].
    bias [N]; residual, out float16 [rows, N], may be the same. Where both operands are integers
    (`Format.is_integer`) products are summed exactly.
    """
    for m, n in _output_blocks(x, weight):
        sums = ACTIVATIONS[activation](_product(x, weight, m, n, bias, scales, format))
        if residual is not None:
            sums += residual[m, n].float()
        out[m, n] = sums


def glu(
    x: Tensor,
    gate: PackedMatrix,
    up: PackedMatrix,
    out: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scales: Tensor | None = None,
    format: str = "fp16",
    activation: str = "silu",
) -> None:
    """out = activation(x · Gᵀ + gate_bias) · (x · Uᵀ + up_bias): Shazeer 2020 (arXiv:2002.05202).

    gate, up [N, K]; all else as in `matmul`.
    """
    for m, n in _output_blocks(x, gate):
        sums = ACTIVATIONS[activation](_product(x, gate, m, n, gate_bias, scales, format))
        out[m, n] = sums.mul_(_product(x, up, m, n, up_bias, scales, format))


def qkv(
    x: Tensor,
    *,
    query_weight: PackedMatrix | None = None,
    key_weight: PackedMatrix | None = None,
    value_weight: PackedMatrix | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    scales: Tensor | None = None,
    format: str = "fp16",
    frequencies: Tensor | None = None,
    head_dim: int = 0,
    start: int = 0,
    seq_len: int = 1,
) -> None:
    """Attention's three products of x, or those of them whose weights are given.

    With `frequencies` queries and keys are rotated as by `rotary`, after they were rounded to
    float16. All else as in `matmul`.
    """
    for weight, out, bias in (
        (query_weight, query, query_bias),
        (key_weight, key, key_bias),
        (value_weight, value, value_bias),
    ):
        if weight is None or out is None:
            continue
        matmul(x, weight, out, bias=bias, scales=scales, format=format)
        if frequencies is not None and out is not value:
            rotary(out, frequencies, out, head_dim=head_dim, start=start, seq_len=seq_len)


def workspace_bytes(rows: int) -> int:
    """These kernels need none."""
    del rows
    return 0


def use_workspace(memory: Tensor) -> None:
    """Nothing is done with it."""
    del memory


def _output_blocks(x: Tensor, weight: PackedMatrix) -> Iterator[tuple[slice, slice]]:
    for m in _blocks(x.shape[0], _ROWS):
        for n in _blocks(weight.rows, _TILE // _ROWS):
            yield m, n


def _product(
    x: Tensor,
    weight: PackedMatrix,
    m: slice,
    n: slice,
    bias: Tensor | None,
    scales: Tensor | None,
    format: str,
) -> Tensor:
    """Rows m and columns n of x · Wᵀ + bias, float32."""
    kind = formats.get(format)
    if scales is not None and kind.is_integer and weight.format.is_integer:
        sums = _integer_sums(kind.integers(x[m]), weight, n)
        sums *= scales[m].float()
    else:
        sums = torch.zeros(m.stop - m.start, n.stop - n.start, device=x.device)
        for c in _blocks(weight.columns, _WEIGHT_COLUMNS):
            operand = _operand(x[m, c], None if scales is None else scales[m], c, kind)
            for w in _weight_blocks(n):
                part = sums[:, w.start - n.start : w.stop - n.start]
                part.addmm_(operand, _weights(weight, w, c).t())
    if bias is not None:
        sums += bias[n].float()
    return sums


def _integer_sums(x: Tensor, weight: PackedMatrix, n: slice) -> Tensor:
    """Exact sums of products, times the weight's scales: float32 [rows, n]."""
    assert weight.scales is not None
    # Below 2²⁴ as long as K is below 132,104: float32 holds them exactly, in whatever order.
    sums = torch.zeros(x.shape[0], n.stop - n.start, device=x.device)
    for c in _blocks(weight.columns, _WEIGHT_COLUMNS):
        operand = x[:, c].float()
        for w in _weight_blocks(n):
            codes = weight.format.integers(_tiles(weight, w, c).codes)
            sums[:, w.start - n.start : w.stop - n.start].addmm_(operand, codes.float().t())
    return sums.mul_(weight.format.scale_values(weight.scales[0, n]))


def _operand(x: Tensor, scales: Tensor | None, c: slice, kind: Format) -> Tensor:
    """Columns c of an activation as float32, from float16 or from codes with their rows' scales."""
    if scales is None:
        return x.float()
    if x.dtype == torch.float16:
        return x.float() * scales
    if kind.group is not None:
        scales = scales[:, c.start // kind.group : -(-c.stop // kind.group)]
    return kind.dequantise(Quantised(x, scales))


def _weights(weight: PackedMatrix, rows: slice, columns: slice) -> Tensor:
    return weight.format.dequantise(_tiles(weight, rows, columns))


def _tiles(weight: PackedMatrix, rows: slice, columns: slice) -> Quantised:
    """Rows and columns that begin with a tile, and end with one or with the matrix."""
    layout = weight.layout
    row, column = rows.start // layout.tile_rows, columns.start // layout.tile_columns
    row_tiles = -(-rows.stop // layout.tile_rows) - row
    return weight.tiles(row, row_tiles, column, -(-columns.stop // layout.tile_columns) - column)


def _attended(
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
    for c in _blocks(int(positions[-1]) + 1, _KEYS):
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


def _rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x float32 [..., rows, heads, d], rotated."""
    angles = positions.float().outer(frequencies).unsqueeze(-2)
    cos, sin = angles.cos(), angles.sin()
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _blocks(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _row_blocks(x: Tensor) -> Iterator[slice]:
    return _blocks(x.shape[0], max(1, _TILE // x.shape[1]))


def _weight_blocks(n: slice) -> Iterator[slice]:
    for start in range(n.start, n.stop, _WEIGHT_ROWS):
        yield slice(start, min(start + _WEIGHT_ROWS, n.stop))
