"""How fast and how large a whole model of LLaMA-2-70B's dimensions is, with random weights.

    python benchmarks/decode.py OUT [--cases int4,fp16] [--limit-s 330]

One random packed layer is written a format, and linked under the names of all 80: nothing else of
140 GB is on the disk. Each case is a process of its own. Its milliseconds are wall time of tokens
65 to 128 after prompts of 16, all in; its MiB are NVML's of the process. OUT/decode.json has all
numbers, and is written anew after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 80,
    "vocab_size": 32000,
    "max_position_embeddings": 1 << 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
}
PROMPT, FIRST, LAST, LONG_PROMPT = 16, 65, 128, 2048


class Case(NamedTuple):
    """What one process measures; past: tokens that are said to be in the cache, 0 for none."""

    format: str
    batch_size: int
    context: int
    chunk: int = 2048
    past: int = 0

    @property
    def name(self) -> str:
        past = f"-past{self.past}" if self.past else ""
        return f"{self.format}-b{self.batch_size}-c{self.context}{past}"


# 6553 tokens are 2 GiB of cache.
CASES = (
    Case("int4", 1, 6553),
    Case("int4", 32, 4096, 512),
    Case("fp16", 1, 4096),
    Case("fp8", 1, 4096),
    Case("int1", 1, 4096),
    Case("int4", 1, 33024, past=32768),
    Case("fp16", 32, 256, 512),
)


def main() -> int:
    """Parent: every case in a process; child (`--one`): one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default="", help="formats or names of cases, comma-separated")
    parser.add_argument("--limit-s", type=float, default=330.0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", default=None)
    given = parser.parse_args()
    config = CONFIG | (TINY if given.tiny else {})
    if given.one is not None:
        case, folder = json.loads(given.one)
        print(json.dumps(measure(Case(*case), Path(folder), given.device)))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = set(filter(None, given.cases.split(",")))
    cases = [c for c in CASES if not wanted or wanted & {c.format, c.name}]
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folders: dict[str, Path] = {}
        for case in cases:
            if time.monotonic() - began > given.limit_s:
                found[case.name] = {"skipped": "no time left"}
                continue
            if case.format not in folders:
                folders[case.format] = written(case.format, config, Path(temporary))
            told = json.dumps([case, str(folders[case.format])])
            own = ["--device", given.device] if given.device else []
            done = subprocess.run(
                [sys.executable, __file__, str(given.out), "--one", told, *own],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                found[case.name] = {"failed": done.stderr[-2000:]}
            else:
                found[case.name] = json.loads(done.stdout.splitlines()[-1])
            (given.out / "decode.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{case.name}: {_told(found[case.name])}", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0


def _told(row: dict[str, Any]) -> str:
    if "failed" in row:
        lines = row["failed"].strip().splitlines() or ["?"]
        return f"failed: {lines[-1][:300]}"
    return ", ".join(f"{name} {value:,.3f}" for name, value in row.items() if value is not None)


def written(spec: str, config: dict[str, Any], folder: Path) -> Path:
    """A packed folder whose layers are one file under many names."""
    import torch

    from memladder import formats
    from memladder.engine.compile import layers
    from memladder.engine.packed import folder as folders
    from memladder.engine.packed import rest
    from memladder.engine.packed.packed_layer import Form
    from memladder.models import cache, catalogue, ends

    out = folder / spec
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    layer = catalogue.read(out / "config.json", cache.default_dir()).layer(0)
    compiled = layers.ensure_apart(layer, cache.default_dir())
    form = Form(compiled.fused, formats.get(spec), {})
    torch.manual_seed(0)
    first = out / folders.layer_file(0)
    write(first, form.contents, dict(compiled.constants))
    for number in range(1, config["num_hidden_layers"]):
        (out / folders.layer_file(number)).hardlink_to(first)
    own = ends.find(config)
    fp16 = formats.get("fp16")
    sizes = dict.fromkeys(own.tensors, (1,))
    held = rest.contents(own, fp16, fp16, sizes)
    write(out / folders.REST, held, {})

    def packed(name: str, nbytes: int) -> folders.Packed:
        size = (out / name).stat().st_size
        return folders.Packed(name, size, "", nbytes, 1, None, ())

    count = config["num_hidden_layers"]
    names = [folders.layer_file(number) for number in range(count)]
    folders.Index(
        folders.VERSION,
        config,
        folders.Options(spec),
        "",
        own,
        sizes,
        count,
        tuple(packed(name, form.nbytes) for name in names),
        packed(folders.REST, held.nbytes),
        (),
    ).save(out)
    return out


def write(path: Path, contents: Any, constants: dict[str, Any]) -> None:
    """A packed file of normal weights, of which a few rows are drawn and the rest are copies."""
    import torch
    from safetensors.torch import save_file

    from memladder.kernels.layout import Layout

    tensors = dict(constants)
    for name, (kind, rows, columns) in contents.matrices.items():
        layout = Layout.of(kind, rows, columns)
        few = min(rows, 4 * layout.tile_rows)
        drawn = kind.quantise(torch.randn(few, columns) * columns**-0.5)
        repeats = -(-rows // few)
        codes = layout.pack(drawn.codes)
        tensors[f"{name}.codes"] = codes.repeat(repeats, 1, 1, 1)[: layout.shape[0]].contiguous()
        for part in ("scales", "zeros"):
            values = getattr(drawn, part)
            if values is not None:
                whole = values.repeat(repeats, 1)[:rows].t().contiguous()
                tensors[f"{name}.{part}"] = whole
    for name, size in contents.vectors.items():
        tensors[name] = torch.ones(size, dtype=torch.float16)
    save_file(tensors, path, dict(contents.metadata))


def measure(case: Case, folder: Path, device: str | None) -> dict[str, float | None]:
    """Seconds to load, milliseconds a step and to the first token, MiB."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    from memladder import load_model

    began = time.monotonic()
    model = load_model(
        folder,
        device=device,
        context=case.context,
        batch_size=case.batch_size,
        chunk=min(case.chunk, case.context),
    )
    found: dict[str, float | None] = {"load_s": time.monotonic() - began}
    for name, nbytes in next(iter(model.memory.values())).items():
        found[f"{name}_mib"] = nbytes / 2**20
    if case.past:
        for stage in model._stages:
            stage._cache.zero_()
        model._past[0], model._active = case.past, [0]
        model.decode([7])
        times = []
        for _ in range(LAST - FIRST + 1):
            start = time.perf_counter()
            model.decode([7])
            times.append(time.perf_counter() - start)
        found["step_ms"] = 1e3 * sum(times) / len(times)
        return found
    prompts = [[(7 * i + s) % 997 for i in range(PROMPT)] for s in range(case.batch_size)]
    for _ in range(2):
        marks = [time.perf_counter() for _ in model.stream(prompts, LAST)]
    found["step_ms"] = 1e3 * (marks[LAST - 1] - marks[FIRST - 2]) / (LAST - FIRST + 1)
    if case.batch_size == 1 and case.context >= LONG_PROMPT:
        prompt = [[(11 * i) % 997 for i in range(LONG_PROMPT)]]
        for _ in range(2):
            start = time.perf_counter()
            model.prefill(prompt)
            found["first_ms"] = 1e3 * (time.perf_counter() - start)
    found["process_mib"] = _process_mib()
    return found


def _process_mib() -> float | None:
    """NVML's bytes of this process; None without a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return float(process.usedGpuMemory) / 2**20
    except pynvml.NVMLError:
        return None
    return None


if __name__ == "__main__":
    sys.exit(main())
