"""How fast a step of decoding attends to a long past on this GPU, against a copy of its bytes.

    python benchmarks/decode_attention.py [--models llama,bloom] [--formats fp16,fp8,int8] [--sweep]

One new token a sequence, over the past that a cache holds: appending to it, and attention. Each
case is timed only after it has agreed with the naive kernels, from poisoned memory, twice bit by
bit. A graph walks over so many layers' caches that none is left in the GPU's own cache; times are
medians. `share`: the time in which this GPU copies as many bytes as the cache holds (half of them
read, half written), by attention's. `--sweep` times other cuts and numbers of parts too. Exit
status 1 where a case differs from its twin.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import layers as benchmark
from memladder.engine.program.cache import CacheShape
from memladder.kernels import cuda, naive
from memladder.kernels.cuda import tuning

DEVICE = benchmark.DEVICE
# Heads, heads of keys and values, size of a head, ALiBi.
MODELS = {"llama": (64, 8, 128, False), "bloom": (112, 112, 128, True)}
PASTS, BATCHES = (4096, 32768), (1, 32)
# What no cache of a GPU holds, and the most that a case takes.
COLD_BYTES, MOST_BYTES = 512 << 20, 16 << 30
# Sequences that are compared, and the largest error.
CHECKED, GATE = 2, 1e-3
PARTS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Case:
    """One shape."""

    model: str
    past: int
    batch: int
    format: str

    @property
    def shape(self) -> CacheShape:
        """Of every layer's cache."""
        return CacheShape(self.batch, self.past, 1, self.format)

    @property
    def nbytes(self) -> int:
        """A layer's cache."""
        _, kv_heads, d, _ = MODELS[self.model]
        return sum(buffer.nbytes for buffer in self.shape.state(kv_heads, d, None))


class Caches:
    """Keys and values of some layers, and a step's operands."""

    def __init__(self, case: Case) -> None:
        self.heads, kv_heads, d, alibi = MODELS[case.model]
        self.case, self.kv_heads, self.d = case, kv_heads, d
        count = max(1, min(32, math.ceil(COLD_BYTES / case.nbytes)))
        self.layers = [self._layer(seed) for seed in range(count)]
        generator = torch.Generator(DEVICE).manual_seed(1)
        made = {"generator": generator, "device": DEVICE, "dtype": torch.float16}
        self.query = torch.randn(case.batch, self.heads * d, **made)
        self.key = torch.randn(case.batch, kv_heads * d, **made)
        rows = [(i, case.past - 1, 1) for i in range(case.batch)]
        self.positions = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        self.slopes = None
        if alibi:
            self.slopes = 2.0 ** (-8 * torch.arange(1, self.heads + 1, device=DEVICE) / self.heads)

    def _layer(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        found = {}
        for buffer in self.case.shape.state(self.kv_heads, self.d, None):
            size = (buffer.rows, buffer.columns)
            if buffer.dtype == "float32":
                found[buffer.name] = torch.rand(size, generator=generator, device=DEVICE) / 64
            elif buffer.dtype == "float16":
                found[buffer.name] = torch.empty(size, device=DEVICE, dtype=torch.float16)
                found[buffer.name].normal_(generator=generator)
            else:
                codes = torch.empty(size, device=DEVICE, dtype=torch.uint8)
                # None that stands for NaN.
                found[buffer.name] = codes.random_(0, 120, generator=generator)
        return found

    def attend(self, kernels: ModuleType, layer: int, out: Tensor, partial: Tensor) -> None:
        """Attention of a layer, of as many sequences as `out` has rows."""
        kernels.cached_attention(
            self.query[: len(out)], positions=self.positions[: len(out)], out=out, heads=self.heads,
            kv_heads=self.kv_heads, capacity=self.case.past, start=0, slopes=self.slopes,
            format=self.case.format, partial=partial, **self.layers[layer],
        )  # fmt: skip

    def append(self, layer: int) -> None:
        """A token more for each sequence."""
        cuda.cache_append(
            self.key, self.key, self.positions, kv_heads=self.kv_heads, capacity=self.case.past,
            start=0, format=self.case.format, **self.layers[layer],
        )  # fmt: skip

    def partial(self, parts: int) -> Tensor:
        """Memory for sums over parts of the past; NaN."""
        rows = self.case.batch * self.heads * parts
        return torch.full((rows, self.d + 2), torch.nan, device=DEVICE)


def wrong(caches: Caches, parts: int) -> float:
    """‖y − naive‖ / ‖naive‖ of the first sequences, or infinity where a second run is another."""
    found = [torch.full_like(caches.query[:CHECKED], torch.nan) for _ in "abc"]
    for kernels, out in zip((naive, cuda, cuda), found, strict=True):
        caches.attend(kernels, 0, out, caches.partial(parts)[: len(out) * caches.heads * parts])
    if not torch.equal(found[1], found[2]):
        return math.inf
    expected, mine = found[0].double(), found[1].double()
    return float((mine - expected).norm() / expected.norm())


def seconds(caches: Caches, parts: int) -> float:
    """Of one layer's attention."""
    out, partial = torch.empty_like(caches.query), caches.partial(parts)

    def launch() -> None:
        for layer in range(len(caches.layers)):
            caches.attend(cuda, layer, out, partial)

    return benchmark.graphed(launch) / len(caches.layers)


def appending(caches: Caches) -> float:
    """Seconds of appending, of one layer."""

    def launch() -> None:
        for layer in range(len(caches.layers)):
            caches.append(layer)

    return benchmark.graphed(launch) / len(caches.layers)


def swept(caches: Caches) -> tuple[float, str]:
    """The fastest cut and number of parts."""
    key = next(key for key in tuning.asked() if key.startswith("cached_attention 16 rows"))
    found = []
    for cut in tuning.asked()[key]:
        tuning.prefer({key: cut})
        found += [(seconds(caches, parts), f"{parts} parts, {cut}") for parts in PARTS]
    tuning.prefer({})
    return min(found)


def report(case: Case, copy: float, sweep: bool) -> bool:
    """A line of the table; whether the case agrees with its twin."""
    caches = Caches(case)
    parts = case.shape.parts(case.batch, 1, caches.heads, caches.kv_heads, None)
    error = wrong(caches, parts)
    took, append = seconds(caches, parts), appending(caches)
    least = case.nbytes / copy
    line = (
        f"| {case.model} | {case.past} | {case.batch} | {case.format} | {parts} | "
        f"{took * 1e6:.1f} | {append * 1e6:.1f} | {case.nbytes / took / 1e12:.2f} | "
        f"**{least / took:.2f}** | {error:.1e} |"
    )
    if sweep:
        best, how = swept(caches)
        line += f" {best * 1e6:.1f} ({least / best:.2f}): {how} |"
    print(line, flush=True)
    return error < GATE


def main(arguments: Sequence[str] | None = None) -> int:
    """The table, on standard output."""
    parser = argparse.ArgumentParser(description="Decoding's attention, against a copy")
    parser.add_argument("--models", default="llama")
    parser.add_argument("--formats", default="fp16,fp8,int8")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args(arguments)
    copy = benchmark.copy_rate()
    print(f"{torch.cuda.get_device_name()}: copies {copy / 1e12:.2f} TB/s\n")
    columns = ["model", "past", "batch", "format", "parts", "µs", "append, µs", "TB/s", "share"]
    columns += ["error", *(["best, µs (share)"] if given.sweep else [])]
    print(f"| {' | '.join(columns)} |\n|{'---|' * 4}{'---:|' * (len(columns) - 4)}")
    right = True
    for model in given.models.split(","):
        for past in PASTS:
            for batch in BATCHES:
                for format in given.formats.split(","):
                    case = Case(model, past, batch, format)
                    if case.nbytes <= MOST_BYTES:
                        with torch.inference_mode():
                            right &= report(case, copy, given.sweep)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
