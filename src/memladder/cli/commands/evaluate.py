"""`memladder evaluate`: what packed models lost, over a text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from memladder.cli.console import plain_console
from memladder.cli.ending import needed
from memladder.cli.terminal import progress_bar
from memladder.core.errors import UsageError
from memladder.core.files import write_atomic

if TYPE_CHECKING:
    from memladder.checks.quality import Logits, Score

_MOST_BYTES = 1 << 28


def evaluate(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="What `quantize --all` has written.")
    ],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8.")],
    reference: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="The same model packed in fp16, or its checkpoint (transformers)."
        ),
    ],
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens between windows; default: half.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda:N", help="Default: a GPU where there is one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The same as JSON.")
    ] = None,
) -> None:
    """Perplexity over a text, beside the fp16 model's; SQNR of logits; agreement."""
    stride = max(1, context // 2) if stride is None else stride
    if stride > context:
        raise UsageError(f"a stride of {stride} tokens leaves out some of windows of {context}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with needed("evaluate", "ladder"):
        from memladder.checks import quality
        from memladder.engine.run.tokenizer import Tokenizer

    tokens = Tokenizer.open(folders[0]).ids(_read(text))
    if len(tokens) < 2:
        raise UsageError(f"{text} has {len(tokens)} tokens; 2 or more are wanted")
    named = {str(folder): _packed(folder, context, device) for folder in folders}
    beside = _reference(reference, context, device)
    with progress_bar("reading") as progress:
        own, found = quality.judge(
            tokens, beside, named, context=context, stride=stride, tell=progress
        )
    scores = {f"{reference} (reference)": own, **found}
    plain_console().print(_table(scores))
    if out is not None:
        told = {
            "text": text.name,
            "tokens": len(tokens),
            "predicted": own.tokens,
            "context": context,
            "stride": stride,
            "models": {name: _row(score) for name, score in scores.items()},
        }
        write_atomic(out, json.dumps(told, indent=1, allow_nan=False) + "\n")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path}: larger than {_MOST_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8") from None


def _packed(folder: Path, context: int, device: str | None) -> Logits:
    from memladder.engine.run.load import load_model

    model = load_model(
        folder, device=device, context=context, chunk=min(context, 512), every_logits=True
    )
    return model.logits


def _reference(folder: Path, context: int, device: str | None) -> Logits:
    """A packed folder's model, or a checkpoint's in float32, by transformers."""
    from memladder.engine.packed import folder as packed

    if (folder / packed.INDEX).is_file():
        return _packed(folder, context, device)
    return _checkpoint(folder, device)


def _checkpoint(folder: Path, device: str | None) -> Callable[[Sequence[int]], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from memladder.engine.run.layer import torch_device

    where = torch_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # transformers has many ways to fail on a foreign folder
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{folder}: transformers can't load it: {reason}") from None
    model = model.eval().to(where)

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(torch.tensor([list(ids)], device=where)).logits[0]
        return found.float().cpu()

    return logits


def _row(score: Score) -> dict[str, float | None]:
    return {
        "perplexity": score.perplexity,
        # JSON has no infinity: what is the reference itself has None.
        "sqnr_db": score.sqnr_db if math.isfinite(score.sqnr_db) else None,
        "agreement": score.agreement,
    }


def _table(scores: dict[str, Score]) -> Table:
    table = Table("model")
    for title in ("perplexity", "SQNR of logits, dB", "same greedy token, %"):
        table.add_column(title, justify="right")
    for name, score in scores.items():
        sqnr = f"{score.sqnr_db:.2f}" if math.isfinite(score.sqnr_db) else "same"
        table.add_row(name, f"{score.perplexity:,.3f}", sqnr, f"{100 * score.agreement:.2f}")
    return table
