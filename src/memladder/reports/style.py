"""How the figure looks: colours, sizes and matplotlib settings in one place.

Every row carries its system's name, so colour only helps the eye: it is never the only key.
"""

from __future__ import annotations

from memladder.core.record import Status

# Hues from Okabe and Ito's colour-blind-safe set (jfly.uni-koeln.de/color); the Ladder variants are
# one blue whose lightness rises, so that the family stays together in print and in greyscale.
COLOURS = {
    "pytorch": "#D55E00",
    "onnxruntime": "#E69F00",
    "tensorrt": "#33B38F",
    "vllm": "#8F3A6E",
    "vllm_fp16_int4": "#CC79A7",
    "welder": "#5F5F5F",
    "ladder": "#08306B",
    "ladder_fp16_int4": "#0A4A90",
    "ladder_fp16_nf4": "#1F6BB0",
    "ladder_fp8_fp8": "#3F8CC8",
    "ladder_mxfp8_mxfp8": "#66A9DA",
    "ladder_int8_int1": "#8FC3E8",
}
# Systems that the paper does not have: earth tones and a dark teal, which no colour above is near.
OTHER_COLOURS = ("#6B4A2B", "#A47C48", "#8A8F3C", "#2F6B62", "#C9ADA0")

INK = "#1A1A1A"
QUIET = "#5C5C5C"
PALE = "#E3E3E3"
RULE = "#B8B8B8"
GRID = "#E4E4E4"

# A cell without a bar says why. A framework that ran but was not found to agree gets no bar either.
STATUS_TEXT = {
    Status.PLANNED: "planned",
    Status.PREDICTED: "predicted",
    Status.OOM: "out of memory",
    Status.BUSY: "others held the memory",
    Status.UNAVAILABLE: "n/a",
    Status.FAILED: "failed",
    Status.TIMEOUT: "timeout",
}
UNVERIFIED = "unverified"
WRONG = "wrong output"
NOT_RUN = "not run"
EXPLAINED = {
    STATUS_TEXT[Status.UNAVAILABLE]: "n/a: the framework can't run on this machine.",
    UNVERIFIED: "unverified: it ran, but its output was not compared with the reference.",
    WRONG: "wrong output: it ran, but its output is not the layer's.",
}

# Points, and for the layout inches.
TITLE_SIZE, SUBTITLE_SIZE, PANEL_SIZE = 15.0, 9.5, 11.0
NAME_SIZE, VALUE_SIZE, TICK_SIZE, NOTE_SIZE = 8.5, 8.0, 8.0, 8.0
DIGIT_EM, TEXT_EM, PROSE_EM = 0.64, 0.63, 0.57
"""Width of a digit, and generous mean widths of a letter in a name and in prose, in DejaVu Sans."""
ROW, MARGIN, GAP = 0.182, 0.3, 0.3
PLOT_WIDTHS = {1: 6.2, 2: 4.5}
PLOT_WIDTH_OF_MANY = 4.0
BAR_HEIGHT, PALE_HEIGHT, BAR_HEIGHT_ON_PALE = 0.72, 0.92, 0.56
HEADING_ROWS = 1.3
"""Rows of a bar's height that the heading of a shape takes; the last bar keeps 0.15 below it."""
DPI = 200

RC = {
    "axes.linewidth": 0.6,
    "font.family": ["DejaVu Sans"],
    "hatch.linewidth": 0.9,
    "pdf.fonttype": 42,
    "text.color": INK,
}


def colour(system: str, others: tuple[str, ...]) -> str:
    """The colour of a system; `others` are the systems outside the paper, in drawing order."""
    if system in COLOURS:
        return COLOURS[system]
    return OTHER_COLOURS[others.index(system) % len(OTHER_COLOURS)]
