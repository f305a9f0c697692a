"""`memladder check-predictions`: predictions against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memladder.cli.console import print_json
from memladder.cli.options import AsJson, RecordOrStore
from memladder.cli.stores import measured


def check_predictions(
    store: RecordOrStore,
    sealed: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Predictions made before; else made now.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold predictions against what was measured: in total, by row, by category."""
    from memladder.core.serial import to_json
    from memladder.predictor import evidence
    from memladder.reports import predictions

    records = measured(store, None)
    digest, given = evidence.sealed(sealed) if sealed is not None else (None, None)
    compared = evidence.compare(records, given)
    if as_json:
        print_json({"sealed": digest, "cells": to_json(compared)})
        return
    print(predictions.table(records, compared, digest))
