"""`memladder dequantize`: a GGUF file as a Hugging Face checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memladder.cli.ending import needed
from memladder.cli.terminal import progress_bar
from memladder.core.errors import UsageError
from memladder.core.files import new_folder


def dequantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="Of a Llama-type model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
) -> None:
    """Write a GGUF model as a checkpoint in float16, with its tokenizer."""
    with needed("dequantize", "gguf"):
        import gguf  # noqa: F401  (it is imported where the file is read)

        from memladder.models import gguf_import

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is in use; name a new folder, or an empty one")
    with new_folder(out) as part, progress_bar("dequantising") as progress:
        gguf_import.convert(model, part, progress=progress)
    print(out)
