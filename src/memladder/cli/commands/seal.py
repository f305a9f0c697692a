"""`memladder seal`: predictions written before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memladder.core.errors import UsageError


def seal(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where they are written.")],
    models: Annotated[str, typer.Option(metavar="CONFIG,…")] = "llama,bloom",
    frameworks: Annotated[str, typer.Option(metavar="KEY,…|all")] = "all",
    shapes: Annotated[str, typer.Option(metavar="BxS[+P],…")] = "1x1,32x1,1x4096",
    layers: Annotated[str, typer.Option(metavar="N|all")] = "1",
    gpu: Annotated[str, typer.Option(metavar="NAME|cpu")] = "H100",
) -> None:
    """Write predictions to a file before anything is measured, and print its SHA-256."""
    from memladder import frameworks as rows
    from memladder.core.case import Workload
    from memladder.frameworks._rules.question import UnpredictableError
    from memladder.predictor import api, evidence

    if out.exists():
        raise UsageError(f"{out} is there already; what is sealed stays as it is")
    keys = rows.names() if frameworks == "all" else tuple(frameworks.split(","))
    found, reasons = [], set()
    for name in filter(None, models.split(",")):
        for key in keys:
            for text in shapes.split(","):
                load = Workload.parse(text)
                try:
                    found.append(
                        api.predict(
                            name, key, batch_size=load.batch_size, seq_len=load.seq_len,
                            past=load.past, layers=layers, gpu=gpu,
                        )
                    )  # fmt: skip
                except UnpredictableError as error:
                    reasons.add(f"{key}: {error}")
    if not found:
        raise UsageError("nothing could be predicted: " + "; ".join(sorted(reasons))[:300])
    digest = evidence.seal(out, found)
    for reason in sorted(reasons):
        print(f"not sealed: {reason}")
    print(f"{len(found)} predictions in {out}\nsha256 {digest}")
