"""The figure shows its data, all of it, with nothing on top of anything else."""

import functools
import itertools
import subprocess
import sys

import matplotlib as mpl
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from memladder.core.case import Case, Workload
from memladder.core.errors import UsageError
from memladder.core.record import Status
from memladder.paper import figure11
from memladder.paper.published import published
from memladder.paper.rows import MODELS, SHAPES, SYSTEMS
from memladder.reports import figure, style
from memladder.reports.cells import Cell

KEYS = list(itertools.product(MODELS, SYSTEMS, SHAPES))
DEVICE = "NVIDIA H100 80GB HBM3, driver 570.86.15"


def value_of(key):
    return published().values[Case(*key, "cpu").id]


def measured(factor=1.1):
    return {key: Cell(value_of(key) * factor, Status.MEASURED) for key in KEYS}


def cpu_only():
    cells = dict.fromkeys(KEYS, Cell(None, Status.UNAVAILABLE, "n/a"))
    for key in KEYS:
        if key[1] in ("pytorch", "onnxruntime"):
            cells[key] = Cell(value_of(key) * 0.9, Status.MEASURED)
    return cells


def everything():
    cells = measured(0.8)
    cells["bloom", "onnxruntime", Workload(1, 4096)] = Cell(
        None, Status.OOM, "out of memory, asked for 24.0 GiB"
    )
    cells["bloom", "vllm", Workload(1, 4096)] = Cell(None, Status.TIMEOUT, "timeout")
    cells["bloom", "vllm", Workload(32, 1)] = Cell(None, Status.FAILED, "failed")
    for model, shape in itertools.product(MODELS, SHAPES):
        key = (model, "tensorrt", shape)
        cells[key] = Cell(value_of(key) * 0.6, Status.PLANNED, "planned")
        key = (model, "ladder_mxfp8_mxfp8", shape)
        cells[key] = Cell(value_of(key) * 0.99, Status.PREDICTED, "predicted")
        cells[model, "ladder_int8_int1", shape] = Cell(None, Status.MEASURED, style.UNVERIFIED)
        cells[model, "welder", shape] = Cell(None, Status.MEASURED, style.WRONG)
        cells[model, "torchao_int4", shape] = Cell(500.0 * shape.tokens**0.5, Status.MEASURED)
    return cells


def custom_config():
    return {
        ("llama", "pytorch", Workload(1, 1)): Cell(73.25, Status.MEASURED),
        ("llama", "pytorch", Workload(8, 128)): Cell(0.75, Status.MEASURED),
        ("llama", "onnxruntime", Workload(8, 128)): Cell(None, Status.OOM, "out of memory"),
    }


NOTES = (
    "Bars: largest memory of the process tree (PSS, from /proc) while the layer runs in a loop; "
    "median of 3 processes a case.",
    "Measured 2026-11-20 with memladder 0.1.0, 480 polls a second or more.",
)
FIGURES = {
    "published": figure11.published_figure,
    "measured": lambda: figure.measured_figure(
        measured(), figure11.grid(), device_label=DEVICE, notes=NOTES
    ),
    "cpu only": lambda: figure.measured_figure(
        cpu_only(), figure11.grid(), device_label="A processor", notes=NOTES
    ),
    "everything": lambda: figure.measured_figure(
        everything(), figure11.grid(), device_label=DEVICE, notes=NOTES
    ),
    "long texts": lambda: figure.measured_figure(
        everything(),
        figure11.grid(),
        device_label=DEVICE * 9,
        notes=NOTES * 4,
        subtitle="a layer " * 20,
    ),
    "custom": lambda: figure.measured_figure(
        custom_config(), figure11.grid(), device_label=DEVICE, notes=NOTES, custom=True
    ),
    "tiny and huge": lambda: figure.measured_figure(
        {
            ("llama", "pytorch", Workload(1, 1)): Cell(0.004, Status.MEASURED),
            ("bloom", "pytorch", Workload(64, 4096)): Cell(2_345_678.0, Status.PLANNED, "planned"),
        },
        figure11.grid(),
        device_label=DEVICE,
    ),
    "nothing measured": lambda: figure.measured_figure(
        {("llama", "pytorch", Workload(1, 1)): Cell(None, Status.FAILED, "failed")},
        figure11.grid(),
        device_label=DEVICE,
        custom=True,
    ),
}


def bars(axes):
    """Ends of the bars from top to bottom, the published ones apart."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    pale = [p for p in found if mpl.colors.to_hex(p.get_facecolor()).upper() == style.PALE]
    rest = [p for p in found if p not in pale]
    return [
        [patch.get_x() + patch.get_width() for patch in sorted(group, key=Rectangle.get_y)]
        for group in (rest, pale)
    ]


def texts(drawn):
    return [text for text in drawn.findobj(Text) if text.get_visible() and text.get_text().strip()]


@functools.cache
def rendered(name):
    drawn = FIGURES[name]()
    drawn.canvas.draw()
    return drawn


def in_order(model):
    return [(model, system, shape) for shape in SHAPES for system in SYSTEMS]


def test_published_bars_are_the_published_values():
    drawn = figure11.published_figure()
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["LLAMA", "BLOOM"]
    for axes, model in zip(drawn.axes, MODELS, strict=True):
        values = [value_of(key) for key in in_order(model)]
        solid, pale = bars(axes)
        assert solid == pytest.approx(values)
        assert pale == []
        written = [text.get_text() for text in axes.texts]
        assert [text for text in written if text.isdecimal()] == [str(value) for value in values]


def test_measured_bars_stand_before_the_published_ones():
    drawn = figure.measured_figure(measured(1.1), figure11.grid(), device_label=DEVICE)
    for axes, model in zip(drawn.axes, MODELS, strict=True):
        values = [value_of(key) for key in in_order(model)]
        solid, pale = bars(axes)
        assert solid == pytest.approx([1.1 * value for value in values])
        assert pale == pytest.approx(values)


def test_every_row_has_a_name_and_a_value_or_a_reason():
    drawn = figure.measured_figure(everything(), figure11.grid(), device_label=DEVICE)
    for axes in drawn.axes:
        written = [text.get_text() for text in axes.texts]
        for label in [*SYSTEMS.values(), "torchao_int4"]:
            assert written.count(label) == len(SHAPES)
        # Name and value for each of 13 systems at 3 shapes, and the shapes' headings.
        assert len(written) == 13 * 3 * 2 + 3
        assert [w for w in written if w.startswith("batch")] == [
            "batch 1 × seq 1",
            "batch 32 × seq 1",
            "batch 1 × seq 4096",
        ]
    bloom = [text.get_text() for text in drawn.axes[1].texts]
    for note in ("out of memory, asked for 24.0 GiB", "timeout", "failed", "3463 planned"):
        assert note in bloom
    assert bloom.count("unverified") == bloom.count("wrong output") == 3


def test_planned_and_predicted_do_not_look_measured():
    drawn = figure.measured_figure(everything(), figure11.grid(), device_label=DEVICE)
    looks = [(p.get_hatch(), p.get_linestyle()) for p in drawn.axes[0].patches]
    assert sum(hatch is not None for hatch, _ in looks) == 3
    white = [p for p in drawn.axes[0].patches if p.get_facecolor()[:3] == (1, 1, 1)]
    assert len(white) == 6
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "measured",
        "planned by a compiler, not run",
        "predicted, not run",
        "published (A100)",
    ]


def test_what_did_not_run_is_named_and_a_custom_layer_is_not_compared():
    drawn = figure.measured_figure(
        custom_config(), figure11.grid(), device_label=DEVICE, custom=True
    )
    (axes,) = drawn.axes
    written = [text.get_text() for text in axes.texts]
    assert bars(axes)[1] == []
    assert {"73.2", "0.75", "out of memory", "batch 8 × seq 128"} <= set(written)
    assert written.count("not run") == 24 - 3
    assert not drawn.legends


def test_models_and_shapes_of_the_paper_are_always_there_unless_custom():
    cells = {("mixtral", "sglang", Workload(2, 2)): Cell(900.0, Status.MEASURED)}
    drawn = figure.measured_figure(cells, figure11.grid(), device_label=DEVICE)
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["LLAMA", "BLOOM", "mixtral"]
    headings = [t.get_text() for t in drawn.axes[2].texts if t.get_text().startswith("batch")]
    assert headings[-1] == "batch 2 × seq 2"
    assert len(headings) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_on_the_page_and_apart(name):
    drawn = rendered(name)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(drawn)]
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= drawn.bbox.width, text
        assert box.y1 <= drawn.bbox.height, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, f"{one!r} touches {other!r}"


@pytest.mark.parametrize("name", FIGURES)
def test_texts_in_a_panel_stay_in_it_and_off_other_bars(name):
    drawn = rendered(name)
    for axes in drawn.axes:
        panel = axes.get_window_extent()
        pale = mpl.colors.to_rgba(style.PALE)
        solid = [p.get_window_extent() for p in axes.patches if p.get_facecolor() != pale]
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.x1 <= panel.x1, text.get_text()
            assert not any(box.overlaps(bar) for bar in solid), text.get_text()


@pytest.mark.parametrize("name", ["measured", "everything", "long texts"])
def test_the_legend_is_outside_of_the_panels(name):
    drawn = rendered(name)
    (legend,) = drawn.legends
    for axes in drawn.axes:
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_the_axis_has_plain_numbers():
    axes = figure11.published_figure().axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[:7] == ["500", "1000", "2000", "5000", "10000", "20000", "50000"]
    assert axes.get_xscale() == "log"


def test_title_and_notes_say_what_where_and_which_kind():
    drawn = figure11.published_figure()
    written = " ".join(text.get_text() for text in drawn.texts)
    assert "Memory of one decoder layer (MiB): published (A100)" in written
    assert "NVIDIA A100-80GB-PCIe" in written
    assert "OSDI'24" in written
    drawn = figure.measured_figure(cpu_only(), figure11.grid(), device_label=DEVICE, notes=NOTES)
    written = " ".join(text.get_text() for text in drawn.texts)
    assert "(MiB): measured" in written
    assert DEVICE in written
    assert "n/a: the framework can't run on this machine." in written
    assert NOTES[1] in written


def test_files_are_the_same_bytes_each_time_and_whatever_the_user_configured(tmp_path):
    figure11.draw_published(tmp_path / "1.png", tmp_path / "1.pdf")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "pdf.fonttype": 3}):
        figure11.draw_published(tmp_path / "2.png", tmp_path / "2.pdf")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert (tmp_path / "1.pdf").read_bytes() == (tmp_path / "2.pdf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"1.png", "1.pdf", "2.png", "2.pdf"}


def test_the_pdf_embeds_truetype_fonts(tmp_path):
    cells = everything()
    figure.draw_measured(
        cells, figure11.grid(), tmp_path / "f.png", tmp_path / "f.pdf", device_label=DEVICE
    )
    content = (tmp_path / "f.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_folder_that_takes_no_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*png: ") as caught:
        figure11.draw_published(tmp_path / "file" / "f.png", tmp_path / "f.pdf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a $\\undefined{x}$ b", "$", "$$^", "\\frac{", "x" * 9000])
def test_a_devices_name_is_text_and_no_formula(tmp_path, name):
    from memladder.paper import figure11
    from memladder.reports import figure

    cell = Cell(2000.0, Status.MEASURED)
    figure.draw_measured(
        {("llama", "pytorch", Workload(1, 1)): cell},
        figure11.grid(),
        tmp_path / "x.png",
        tmp_path / "x.pdf",
        device_label=name,
        subtitle="",
        notes=(name,),
        custom=False,
    )
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="no records"):
        figure.measured_figure({}, figure11.grid(), device_label=DEVICE)
    many = {("llama", "pytorch", Workload(n, 1)): Cell(1.0, Status.MEASURED) for n in range(1, 70)}
    with pytest.raises(UsageError, match="69 shapes are too many"):
        figure.measured_figure(many, figure11.grid(), device_label=DEVICE, custom=True)


@pytest.mark.parametrize(
    ("value", "status", "note"),
    [
        (None, Status.OOM, ""),
        (5.0, Status.OOM, "out of memory"),
        (0.0, Status.MEASURED, ""),
        (float("nan"), Status.MEASURED, ""),
    ],
)
def test_a_failure_never_becomes_a_number(value, status, note):
    with pytest.raises(ValueError, match="cell"):
        Cell(value, status, note)


def test_drawing_needs_neither_pyplot_nor_torch():
    program = (
        "import sys; from memladder.paper import figure11; figure11.published_figure(); "
        "sys.exit(bool({'matplotlib.pyplot', 'torch', 'psutil', 'pynvml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
