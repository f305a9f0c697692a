"""The page of records, with the published values of the paper's figure over their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from memladder.core.errors import UsageError
from memladder.core.files import write_atomic
from memladder.paper.published import published
from memladder.paper.rows import MODELS, SYSTEMS
from memladder.predictor import model
from memladder.reports.html.page import page
from memladder.reports.html.rows import Shown
from memladder.sweeps import store

MOST_STORES = 8


def report(
    stores: Sequence[str | Path],
    out: str | Path,
    *,
    models: Sequence[str] = tuple(MODELS),
    on_bad: Callable[[str], None] | None = None,
) -> Path:
    """Write one self-contained page of these stores: figure, ledgers, comparison, table, fits.

    A store is a folder of records, a results file or one record; the first two are compared.
    `models` are names or `config.json` files that the form asks about. A file or entry that is no
    record is left out, and goes to `on_bad` as a line; without it, UsageError is raised. Raises
    UsageError and ConfigError; then nothing is written.
    """
    if not 1 <= len(stores) <= MOST_STORES:
        raise UsageError(f"{len(stores)} stores: a report is of 1 to {MOST_STORES}")
    shown = []
    for path, name in zip(stores, _names([Path(path) for path in stores]), strict=True):
        contents = store.read(Path(path))
        for line in contents.complaints():
            if on_bad is None:
                raise UsageError(line)
            on_bad(line)
        shown.append(Shown(name, tuple(contents.records), tuple(contents.verifications)))
    write(shown, Path(out), models)
    return Path(out)


def write(stores: Sequence[Shown], out: Path, models: Sequence[str] = tuple(MODELS)) -> None:
    """Write the page of what was read already. Raises UsageError and ConfigError."""
    text = page(
        stores,
        systems=tuple(SYSTEMS),
        published=published().values,
        published_name="published (A100)",
        models=[model.find(name) for name in models],
    )
    write_atomic(out, text)


def _names(paths: Sequence[Path]) -> list[str]:
    """What to call stores: their files' names, with folders where those are not enough."""
    short = [path.resolve().stem for path in paths]
    if len(set(short)) == len(short):
        return short
    return [str(path) for path in paths]
