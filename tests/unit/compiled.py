"""Compile the Triton kernels for a GPU that need not be there; a line of JSON for each.

    python compiled.py COMPUTE_CAPABILITY PART PARTS

In a process of its own: here Triton must not be its interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from memladder import formats
from memladder.kernels import cuda, functions
from memladder.kernels.cuda import skinny
from memladder.kernels.layout import Layout
from memladder.kernels.packed import PackedMatrix

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PAIRS = [
    *(("fp16", "fp16"), ("int4", "fp16"), ("nf4", "fp16")),
    *(("fp8", "fp8"), ("mxfp8", "mxfp8"), ("int1", "int8")),
]
OTHERS = [("int2", "fp16"), ("mxfp4", "fp16"), ("int4:zero_point=true", "fp16")]


class Absent:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def packed(spec: str, rows: int, columns: int) -> PackedMatrix:
    kind = formats.get(spec)
    layout = Layout.of(kind, rows, columns)
    scales = None
    if kind.scale_dtype is not None:
        scales = torch.zeros(kind.groups(columns), rows, dtype=kind.scale_dtype)
    zeros = torch.zeros(kind.groups(columns), rows, dtype=torch.uint8) if kind.has_zeros else None
    return PackedMatrix(kind, layout, torch.empty(layout.shape, dtype=torch.uint8), scales, zeros)


def activations(rows: int, k: int, spec: str) -> tuple[Tensor, dict[str, Any]]:
    kind = formats.get(spec)
    if kind.scale_dtype is None:
        return torch.empty(rows, k).half(), {}
    scales = torch.empty(rows, kind.groups(k), dtype=kind.scale_dtype)
    return torch.empty(rows, k, dtype=torch.uint8), {"scales": scales, "format": spec}


def products(rows: int, n: int, k: int, weight: str, activation: str) -> Callable[[], None]:
    x, options = activations(rows, k, activation)
    out = torch.empty(rows, n).half()
    return lambda: cuda.matmul(x, packed(weight, n, k), out, residual=out, **options)


def biased(weight: str, activation: str) -> Callable[[], None]:
    """With an epilogue that takes many registers."""
    x, options = activations(512, 8192, activation)
    out = torch.empty(512, 8192).half()
    options |= {"bias": out[0], "activation": "gelu", "residual": out}
    return lambda: cuda.matmul(x, packed(weight, 8192, 8192), out, **options)


def gated(weight: str, activation: str, rows: int = 512) -> Callable[[], None]:
    x, options = activations(rows, 8192, activation)
    out = torch.empty(rows, 8192).half()
    options |= {"gate_bias": out[0], "up_bias": out[0]}
    gate, up = (packed(weight, 8192, 8192) for _ in range(2))
    return lambda: cuda.glu(x, gate, up, out, **options)


def calls(capability: int) -> Iterator[tuple[str, Callable[[], None]]]:
    x = torch.empty(2, 8192).half()
    yield "rms_norm", lambda: cuda.rms_norm(x, x[0], x, eps=1e-5)
    yield "layer_norm", lambda: cuda.layer_norm(x, x[0], x[0], x, eps=1e-5)
    yield "rotary", lambda: cuda.rotary(x, x, x, head_dim=128, start=0, seq_len=1)
    for function in filter(functions.has_kernel, functions.FUNCTIONS):
        two = {"other": x} if functions.FUNCTIONS[function].operands == 2 else {}
        call = partial(cuda.pointwise, x, x, function=function, number=0.5, most=1.0, **two)
        yield f"pointwise {function}", call
    for d, softcap, exact in ((128, 0.0, False), (128, 0.0, True), (256, 50.0, True)):
        query = torch.empty(512, 8 * d).half()
        sizes = {"sequences": 1, "heads": 8, "kv_heads": 8, "window": 100, "softcap": softcap}
        call = partial(cuda.windowed_attention, *(query,) * 4, exact=exact, **sizes)
        yield f"windowed attention {d} {softcap} {exact}", call
    has_fp8 = capability >= 89
    yield from cached(has_fp8)
    yield from around()
    for spec in ("int8", *(("fp8", "mxfp8") if has_fp8 else ())):
        codes = torch.empty(2, 8192, dtype=torch.uint8)
        scales = torch.empty(2, 256, dtype=formats.get(spec).scale_dtype)
        yield f"quantise {spec}", partial(cuda.quantise, x, codes, scales, format=spec)
    for queries, d in ((1, 128), (32, 128), (512, 128), (512, 96)):
        for alibi in (False, True):
            query = torch.empty(queries, 8 * d).half()
            for exact in (False, True):
                yield f"attention {queries} {d} {alibi} {exact}", attended(query, alibi, exact)
    for weight, activation in PAIRS + OTHERS:
        if has_fp8 or "fp8" not in weight:
            for rows in (1, 32, 512):
                call = products(rows, 8192, 8192, weight, activation)
                yield f"matmul {weight} {activation} {rows}", call
    for weight, activation in PAIRS:
        if has_fp8 or "fp8" not in weight:
            yield f"biased {weight} {activation} 512", biased(weight, activation)
            yield f"gated {weight} {activation} 512", gated(weight, activation)
            few = capability >= 90 and formats.get(weight).bits < 8
            for rows in (1, 32) if few else (1,):
                yield f"gated {weight} {activation} {rows}", gated(weight, activation, rows)
                yield f"several {weight} {activation} {rows}", several(weight, activation, rows)
    # Few output channels: smaller tiles.
    yield "matmul int4 fp16 512 narrow", products(512, 1024, 8192, "int4", "fp16")


def cached(has_fp8: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    positions, capacity = torch.zeros(4, 3, dtype=torch.int32), 4096
    for d, heads, kv_heads, rows, kind, spec, exact in (
        *((128, 64, 8, 1, "", "fp16", False), (128, 64, 8, 1, "", "fp8", True)),
        *((128, 112, 112, 1, "alibi", "fp16", True), (256, 8, 4, 1, "gemma", "int8", True)),
        *((96, 32, 32, 16, "gemma", "fp16", True), (80, 71, 1, 1, "", "int8", False)),
        *((128, 64, 8, 512, "", "fp16", False), (128, 64, 8, 512, "alibi", "fp16", True)),
        *((128, 64, 8, 512, "alibi", "int8", True), (128, 64, 8, 512, "", "fp8", True)),
        *((256, 8, 4, 512, "gemma", "fp16", True), (256, 8, 4, 512, "gemma", "int8", True)),
    ):
        if spec == "fp8" and not has_fp8:
            continue
        dtype = torch.float16 if spec == "fp16" else torch.uint8
        held = torch.empty(4 * kv_heads * capacity, d, dtype=dtype)
        query = torch.empty(4 * rows, heads * d).half()
        sizes: dict[str, Any] = {"kv_heads": kv_heads, "capacity": capacity, "start": 0}
        sizes |= {"format": spec}
        if spec != "fp16":
            sizes |= dict.fromkeys(("key_scales", "value_scales"), torch.empty(len(held), 1))
        extra: dict[str, Any] = {"slopes": torch.empty(heads)} if kind == "alibi" else {}
        extra |= {"window": 1000, "softcap": 50.0} if kind == "gemma" else {}
        if rows <= 16:
            extra["partial"] = torch.empty(len(query) * heads * 32, d + 2)
        attend = partial(cuda.cached_attention, query, held, held, positions, query)
        call = partial(attend, heads=heads, exact=exact, **sizes, **extra)
        yield f"cached attention {d} {heads} {rows} {kind} {spec} {exact}", call
        if rows == 1:
            key = torch.empty(4, kv_heads * d).half()
            turned = {"query": query, "turned": query, "frequencies": torch.empty(d // 2)}
            append = partial(cuda.cache_append, key, key, positions, held, held, **sizes)
            yield f"append {d} {spec}", partial(append, **(turned if kind != "alibi" else {}))
    x = torch.empty(4, 1024).half()
    yield "rotary at", lambda: cuda.rotary_at(x, x, positions, x, head_dim=128, start=0)
    yield "advance", lambda: cuda.advance(positions)


def around() -> Iterator[tuple[str, Callable[[], None]]]:
    ids, positions = torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32)
    out, logits = torch.empty(4, 512).half(), torch.empty(4, 1000)
    for spec in ("fp16", "fp8", "mxfp8", "nf4", "int4:zero_point=true", "int1"):
        kind = formats.get(spec)
        numbers = None if kind.bits == 16 else torch.empty(1 << kind.bits)
        table = packed(spec, 1000, 512)
        yield f"embed {spec}", partial(cuda.embed, ids, table, out, factor=2.0, numbers=numbers)
    learned = torch.empty(64 * 512).half()
    options = {"start": 0, "offset": 2}
    yield "add positions", partial(cuda.add_positions, out, learned, positions, out, **options)
    yield "last rows", lambda: cuda.last_rows(torch.empty(64, 512).half(), positions, out)
    for softcap in (0.0, 30.0):
        options = {"factor": 0.5, "softcap": softcap}
        yield f"cap logits {softcap}", partial(cuda.cap_logits, logits, logits, **options)
    yield "choose largest", lambda: cuda.choose_largest(logits, ids)
    for spec in ("fp16", "int4"):
        for rows in (1, 32, 512):
            x, head = torch.empty(rows, 512).half(), packed(spec, 1000, 512)
            call = partial(cuda.matmul, x, head, torch.empty(rows, 1000))
            yield f"head {spec} {rows}", call


def several(weight: str, activation: str, rows: int) -> Callable[[], None]:
    x, options = activations(rows, 8192, activation)
    for part, n in (("query", 8192), ("key", 1024), ("value", 1024)):
        options |= {part: torch.empty(rows, n).half(), f"{part}_weight": packed(weight, n, 8192)}
    return lambda: cuda.qkv(x, **options)


def attended(query: Tensor, alibi: bool, exact: bool) -> Callable[[], None]:
    options: dict[str, Any] = {"slopes": torch.empty(64)} if alibi else {}
    sizes = {"sequences": 1, "heads": 8, "kv_heads": 8, "exact": exact}
    return lambda: cuda.attention(query, query, query, query, **sizes, **options)


def tool(name: str, option: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [TOOLS / name, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(capability: int, part: int, parts: int) -> None:
    triton.runtime.driver.set_active(Absent(capability))
    skinny.set_workspace(torch.empty(skinny.WORKSPACE_BYTES, dtype=torch.uint8))
    made: list[Any] = []

    def compile_only(self: JITFunction, grid: object) -> Callable[..., None]:
        def run(*arguments: object, **options: object) -> None:
            made.append(self.run(*arguments, grid=grid, warmup=True, **options))

        return run

    JITFunction.__getitem__ = compile_only
    for name, call in islice(calls(capability), part, None, parts):
        made.clear()
        call()
        for number, kernel in enumerate(made):
            own = f"{name}, {number}" if number else name
            print(json.dumps(measured(own, kernel)), flush=True)


def measured(name: str, kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes, and what it runs on."""
    usage = tool("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
    found: dict[str, Any] = {
        key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    }
    # Taking a kernel apart takes as long as making it: only products of several rows.
    is_product = re.fullmatch(r"(matmul|biased|gated) .* (32|512)", name)
    sass = tool("cuobjdump", "-sass", kernel.asm["cubin"]) if is_product else ""
    found["tensor"] = sorted(set(re.findall(r"\b(HMMA|IMMA|HGMMA|QGMMA|IGMMA)\b", sass)))
    # How many asynchronous products may be left unfinished where one waits for them.
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", sass)
    found["waits"] = sorted({int(left, 16) for left in waits})
    found["shared"] = kernel.metadata.shared
    return {"name": name, **found}


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET")
    main(*map(int, sys.argv[1:]))
