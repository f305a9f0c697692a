"""Options that several commands take, and the numbers typed in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memladder.core.errors import UsageError

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        help="llama, bloom, or any decoder's config.json or its folder.",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option("--layer", metavar="N", help="Which layer, from 0; default: the usual one."),
]
Layers = Annotated[
    str,
    typer.Option(
        "--layers",
        metavar="all|N",
        help="A model's all or first N layers with embeddings and head; 1: a layer alone.",
    ),
]
Past = Annotated[
    str,
    typer.Option("--past", metavar="N", help="Tokens of each sequence in a key-value cache."),
]
Framework = Annotated[
    str, typer.Option("--framework", help="A framework's key; `memladder frameworks` lists them.")
]
BatchSize = Annotated[
    str, typer.Option("--batch_size", "--batch-size", metavar="N", help="Sequences in the batch.")
]
SeqLen = Annotated[
    str, typer.Option("--seq_len", "--seq-len", metavar="N", help="Tokens in each sequence.")
]
Models = Annotated[
    str | None, typer.Option(metavar="NAME|PATH,…", help="Models; default: llama,bloom.")
]
Frameworks = Annotated[
    str | None,
    typer.Option(metavar="KEY,…|all", help="Frameworks; default: the figure's twelve systems."),
]
Shapes = Annotated[
    str | None,
    typer.Option(metavar="BxS[+P],…", help="Shapes, P of a past; default: 1x1,32x1,1x4096."),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cuda|cuda:N|cpu", help="Where to run; auto prefers a GPU.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Measure again what log/ already has for this environment.")
]
Retry = Annotated[
    str | None,
    typer.Option(metavar="STATUS,…", help="Also measure again what ended so, e.g. oom,failed."),
]
Repeats = Annotated[str, typer.Option(metavar="N", help="Processes per case; the median counts.")]
Timeout = Annotated[str, typer.Option(metavar="SECONDS", help="Time limit of one process.")]
OutputDir = Annotated[Path, typer.Option(help="Where log/, png/ and pdf/ are written.")]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Hugging Face config.json of another size.")
]
CacheDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Weights and exported models are cached here.")
]
Results = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also merge the records into this file.")
]
StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="A folder such as log/ or a results file.")
]
KvFormat = Annotated[
    str, typer.Option("--kv-format", metavar="FORMAT", help="Of keys and values: fp8, q8_0, …")
]
ModelConfig = Annotated[
    str,
    typer.Option("--model", metavar="CONFIG", help="A config.json or its folder; llama, bloom."),
]
Sequences = Annotated[str, typer.Option("--batch_size", "--batch-size", metavar="N")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecordOrStore = Annotated[
    Path, typer.Argument(metavar="RECORD|STORE", help="A record, a folder, or a results file.")
]

HERE = Path()
DEFAULT_TIMEOUT = "1800"
MAX_REPEATS = 100
MAX_LAYER = (1 << 20) - 1
MAX_MIB = 1 << 30


def count(name: str, text: str, limit: int, least: int = 1) -> int:
    """A whole number from `least` to `limit`. Raises UsageError."""
    digits = text.strip()
    value = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else -1
    if not least <= value <= limit:
        raise UsageError(f"{name} {text[:40]!r} is not a whole number from {least} to {limit}")
    return value


def seconds(text: str) -> float:
    """A time limit. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"timeout {text[:40]!r} is not a positive number of seconds")
    return value


def whole(name: str, text: str) -> int:
    """A whole number. Raises UsageError."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12):
        raise UsageError(f"{name} {text[:40]!r} is not a whole number")
    return int(digits)
