"""Ledgers as stacked bars, one a case, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memladder.core.errors import UsageError
from memladder.core.ledger import CATEGORIES, Ledger
from memladder.core.units import MIB

_KINDS = (".png", ".svg")
_WIDTH, _ROW = 11.0, 0.28


def draw(ledgers: Sequence[tuple[str, Ledger]], path: Path) -> None:
    """Write the picture. Raises UsageError for a name that is neither .png nor .svg."""
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"{path}: a picture's name ends in {' or '.join(_KINDS)}")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = [n for n in CATEGORIES if any(ledger.nbytes(n) > 0 for _, ledger in ledgers)]
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(figsize=(_WIDTH, 1.2 + _ROW * len(ledgers)))
    left = [0.0] * len(ledgers)
    cases = [case for case, _ in ledgers]
    for index, name in enumerate(names):
        sizes = [max(ledger.nbytes(name), 0) / MIB for _, ledger in ledgers]
        axes.barh(cases, sizes, left=left, label=name, color=colours(index % 20))
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("MiB, measured while steady")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    axes.tick_params(labelsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
