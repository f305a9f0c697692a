"""The arena as a picture: where each buffer lies, from the step that writes it to the last that
reads it."""

from __future__ import annotations

from pathlib import Path

from memladder.core.units import mib
from memladder.engine.program.plan import ArenaPlan
from memladder.engine.program.steps import Program

# Okabe and Ito 2008: told apart by everyone.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
# Paul Tol's greys and browns follow where there are more kinds of buffers.
_MORE = ("#882255", "#117733", "#332288", "#aa4499", "#44aa99", "#661100")


def draw(program: Program, planned: ArenaPlan, path: Path) -> None:
    """Write the picture, in the format of the file's ending. The same program gives the same file.

    Buffers whose names differ by a number (chunks) have one colour.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    lifetimes = program.lifetimes()
    steps = len(program.steps)
    used = [buffer for buffer in program.buffers if buffer.name in lifetimes]
    kinds = list(dict.fromkeys(buffer.name.partition(".")[0] for buffer in used))
    colours = dict(zip(kinds, (_COLOURS + _MORE) * len(kinds), strict=False))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for buffer in used:
        first, last = lifetimes[buffer.name]
        start, stop = max(first, 0), min(last + 1, steps)
        axes.broken_barh(
            [(start, stop - start)],
            (mib(planned.offsets[buffer.name]), mib(buffer.nbytes)),
            color=colours[buffer.name.partition(".")[0]],
            edgecolor="white",
            linewidth=0.4,
        )
    axes.set_xlim(0, steps)
    axes.set_ylim(0, mib(planned.nbytes))
    axes.set_xlabel("step")
    axes.set_ylabel("arena, MiB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    legend = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=legend[::-1], loc="outside right upper", frameon=False)
    # Without these a file would hold the date, and identifiers by chance.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "memladder", "svg.fonttype": "none"}):
        figure.savefig(path, metadata=metadata, dpi=150)
