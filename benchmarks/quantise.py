"""How long the figure's layers take to quantise, to load, and how much memory that needs.

    python benchmarks/quantise.py [FORMAT …]

Each in a process of its own. The bounds, for two cores: int4 of the LLaMA layer in 20 s, of the
BLOOM layer in 60 s; every format within 256 MiB beyond its packed result; loaded within 2 s.
Exit status 1 when one does not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memladder import formats, models
from memladder.core.units import MIB
from memladder.models.cache import default_dir

LIMITS_S = {("llama", "int4"): 20.0, ("bloom", "int4"): 60.0}
LOAD_S = 2.0
SPARE = 256 * MIB


def main(names: list[str]) -> int:
    """Print a line for each model and format."""
    holds = True
    print(f"{'model':6} {'format':6} {'s':>6} {'load s':>7} {'packed MiB':>11} {'peak MiB':>9}")
    for model in models.names():
        for name in names or formats.names():
            with tempfile.TemporaryDirectory(dir=default_dir()) as folder:
                path = Path(folder) / "packed.safetensors"
                packed = _child("pack", model, name, str(path))
                loaded = _child("load", str(path))
            good = packed["s"] <= LIMITS_S.get((model, name), float("inf"))
            good &= loaded["s"] <= LOAD_S and packed["peak"] <= packed["bytes"] + SPARE
            holds &= good
            print(
                f"{model:6} {name:6} {packed['s']:6.1f} {loaded['s']:7.2f} "
                f"{packed['bytes'] / MIB:11.1f} {packed['peak'] / MIB:9.1f}"
                f"{'' if good else '  out of bounds'}",
                flush=True,
            )
    return 0 if holds else 1


def _child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _pack(model: str, name: str, path: str) -> dict[str, float]:
    from memladder.engine.compile import layers
    from memladder.engine.packed import packing
    from memladder.models import weights

    config, kind = models.layer_config(model), formats.get(name)
    data = weights.ensure(config, default_dir(), 0)
    compiled = layers.ensure_apart(config, default_dir())
    rows = packing.reader(lambda tensor: (data, tensor))
    before = _peak()
    started = time.perf_counter()
    packing.pack(compiled, kind, rows, Path(path))
    seconds = time.perf_counter() - started
    return {"s": seconds, "peak": _peak() - before, "bytes": Path(path).stat().st_size}


def _load(path: str) -> dict[str, float]:
    from memladder.engine.packed import packed_layer

    started = time.perf_counter()
    packed_layer.load(Path(path))
    return {"s": time.perf_counter() - started}


def _peak() -> int:
    """The most that this process has had resident, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        work = {"pack": _pack, "load": _load}[sys.argv[2]]
        print(json.dumps(work(*sys.argv[3:])))
        sys.exit()
    sys.exit(main(sys.argv[1:]))
