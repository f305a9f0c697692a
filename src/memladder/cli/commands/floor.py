"""`memladder floor`: the engine's cells against their budget."""

from __future__ import annotations

import typer

from memladder.cli.options import StorePath
from memladder.cli.stores import left_out, read_store
from memladder.core.errors import UsageError


def floor(store: StorePath) -> None:
    """Hold the engine's cells in STORE against their budget."""
    from memladder.reports import budget

    records = read_store(store).records
    tables = [
        found for device in ("cpu", "cuda") if (found := budget.rows(records, device, left_out))
    ]
    if not tables:
        raise UsageError(f"{store} holds no measured cell of ladder")
    print("\n".join(map(budget.to_markdown, tables)), end="")
    raise typer.Exit(0 if all(row.holds for rows in tables for row in rows) else 1)
