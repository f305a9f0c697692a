"""What each command does: read the request, measure, keep, draw, print.

stdout carries results only; progress, warnings and hints go to stderr.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from memladder import api, frameworks, models
from memladder.cli.console import plain_console
from memladder.cli.ending import say
from memladder.cli.terminal import telling
from memladder.core.case import Case, Workload
from memladder.core.errors import UnavailableError, UsageError
from memladder.core.files import writable_folder, write_atomic
from memladder.core.record import Check, Record, Status, Verification
from memladder.core.units import format_bytes, mib
from memladder.meter import environment
from memladder.meter.outside import runner
from memladder.models import Subject
from memladder.models.cache import default_dir
from memladder.paper import rows
from memladder.reports import printing
from memladder.sweeps import cases as sweep_cases
from memladder.sweeps import store, subjects
from memladder.sweeps.executors import serial

if TYPE_CHECKING:
    from memladder.engine.packed.packing import Progress

# Ended as the protocol foresees; anything else is a failure of the run.
_GOOD = (Status.MEASURED, Status.PLANNED, Status.OOM)


@dataclass(frozen=True)
class Request:
    """What the user asked for, as typed; None where nothing was."""

    models: str | None = None
    frameworks: str | None = None
    shapes: str | None = None
    device: str = "auto"
    config: Path | None = None
    layer: int | None = None
    layers: int | str = 1
    repeats: int = 1
    timeout_s: float = 1800.0
    output_dir: Path = Path()
    cache_dir: Path | None = None
    fresh: bool = False
    retry: str | None = None
    results: Path | None = None

    @property
    def log(self) -> Path:
        """The folder of the records."""
        return self.output_dir / "log"

    @property
    def wanted(self) -> tuple[str, ...]:
        """Which models, by name or path; the figure's by default."""
        return tuple(rows.MODELS) if self.models is None else sweep_cases.parse_models(self.models)

    @property
    def framework_names(self) -> tuple[str, ...]:
        """Which frameworks; the figure's by default."""
        if self.frameworks is None:
            return tuple(rows.SYSTEMS)
        return sweep_cases.parse_frameworks(self.frameworks, first=rows.SYSTEMS)

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """At which shapes; the figure's by default."""
        return rows.SHAPES if self.shapes is None else sweep_cases.parse_shapes(self.shapes)

    def subjects(self) -> dict[str, Subject]:
        """What is measured of each model, with a note on stderr where that is not all that was
        asked for."""
        found = subjects.subjects(
            self.wanted,
            self.options().cache_dir,
            config=self.config,
            layer=self.layer,
            layers=self.layers,
        )
        for name, subject in found.items():
            for note in (subject.note, subjects.too_long(subject, self.workloads)):
                if note:
                    say(f"note: {name}: {note}")
        return found

    def options(self) -> serial.SweepOptions:
        """How to measure."""
        return serial.SweepOptions(
            cache_dir=(self.cache_dir or default_dir()).absolute(),
            repeats=self.repeats,
            limits=runner.Limits(timeout_s=self.timeout_s),
            fresh=self.fresh,
            retry=sweep_cases.parse_statuses(self.retry),
        )


def draw_published(output_dir: Path) -> None:
    """Draw the published figure as `png/` and `pdf/memory_usage_a100.*`."""
    from memladder.paper import figure11

    png, pdf = _pictures(output_dir, "a100")
    figure11.draw_published(png, pdf)
    print(f"{png}\n{pdf}")


def draw_store(path: Path, output_dir: Path) -> None:
    """Draw the measured figure and its table from a store: one for each device in it."""
    contents = _read_store(path)
    if not contents.records:
        raise UsageError(f"{path} holds no records")
    for device, records in _by_device(contents.records).items():
        checks = [item for item in contents.verifications if item.device == device]
        _draw(records, checks, output_dir)


def _by_device(records: Sequence[Record]) -> dict[str, list[Record]]:
    """What one figure can show, in the records' order: a device's records, and every plan, which is
    of its target wherever it was made; of two of a case, the one made on the device."""
    plans = [record for record in records if record.plan is not None]
    ran = [record for record in records if record.plan is None]
    found = {}
    for device in dict.fromkeys(record.case.device for record in ran or plans[:1]):
        last = sorted(plans, key=lambda plan: plan.case.device == device)
        shown = {record.case.id: record for record in last}
        found[device] = [
            record
            for record in records
            if (record.case.device == device if record.plan is None else record in shown.values())
        ]
    return found


def _draw(
    records: Sequence[Record], verifications: Sequence[Verification], output_dir: Path
) -> None:
    from memladder.paper import figure11
    from memladder.paper.published import published
    from memladder.reports import cells, figure, table

    found = cells.cells_from(records, verifications)
    custom = _custom(records)
    page = table.to_markdown_report(records, verifications, {} if custom else published().values)
    png, pdf = _pictures(output_dir, _slug(records))
    figure.draw_measured(
        found,
        figure11.grid(),
        png,
        pdf,
        device_label=cells.device_label(records),
        subtitle=_layers(records) if custom else "",
        notes=cells.notes_from(records),
        custom=custom,
    )
    write_atomic(png.with_suffix(".md"), page)
    print(f"{png}\n{pdf}\n{png.with_suffix('.md')}")


def _layers(records: Iterable[Record]) -> str:
    """Which layers were measured, where they are not the figure's."""
    found = {
        record.case.model: f"{models.title(record.case.model)} layer of "
        f"{record.layer.parameters:,} parameters, "
        f"hidden size {record.layer.config.get('hidden_size', 'unknown')}"
        for record in records
        if record.layer is not None
    }
    return "; ".join(found.values())


def _custom(records: Iterable[Record]) -> bool:
    """Is any layer another than the figure's, so that the published values say nothing of it?"""
    return any(
        record.layer is not None
        and (
            record.case.model not in models.names()
            or record.layer.digest != models.layer_config(record.case.model).digest
        )
        for record in records
    )


def _pictures(output_dir: Path, slug: str) -> tuple[Path, Path]:
    names = tuple(output_dir / kind / f"memory_usage_{slug}.{kind}" for kind in ("png", "pdf"))
    for name in names:
        writable_folder(name.parent)
    return names[0], names[1]


def _slug(records: Sequence[Record]) -> str:
    """A device's short name for files: `h100`, `cpu`; the published figure's name stays its own."""
    from memladder.reports import cells

    shown = cells.representative(records)
    if shown.case.device == "cpu":
        return "cpu"
    name = shown.environment.machine.device.lower().replace("nvidia", "")
    model = re.search(r"[a-z]*\d+[a-z]*", name.replace("geforce", "").replace("rtx ", "rtx"))
    slug = model[0] if model else re.sub(r"\W+", "_", name).strip("_")
    return "a100_measured" if slug == "a100" else slug


def measure(request: Request) -> int:
    """Measure one case; prints the artifact's two lines. 0 when measured or out of memory."""
    device = environment.resolve_device(request.device)
    _single("model", request.wanted)
    framework = _single("framework", request.framework_names)
    (shape,) = request.workloads
    ((model, subject),) = request.subjects().items()
    case = Case(model, framework, shape, device, request.layers)
    options = request.options()
    kept = store.Store(request.log)
    with kept.locked():
        past = f" past {shape.past}" if shape.past else ""
        scope = f" layers {case.layers}" if case.whole else ""
        print(
            f"Measure the memory for {model} batch {shape.batch_size} seq {shape.seq_len}"
            f"{past}{scope} under {framework}",
            flush=True,
        )
        with telling(case.id, plain_console(stderr=True)) as tell:
            record = api.measured(case, subject, options, kept, tell)
        path = kept.save(record)
    if record.steady_bytes is not None:
        print({case.id: round(mib(record.steady_bytes))})
    _explain(record, path)
    return 0 if record.status in _GOOD else 1


def _single(kind: str, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UsageError(f"one {kind} is measured at a time, not {', '.join(names)}")
    return names[0]


def _explain(record: Record, path: Path) -> None:
    lines = [f"{record.status}; record: {path}"]
    if record.plan is not None:
        size = format_bytes(record.plan.nbytes)
        lines = [f"planned for {record.plan.target}: {size}; {record.reason}; record: {path}"]
    elif record.reason:
        lines = [f"{record.status}: {record.reason}; record: {path}"]
    if record.hint:
        lines.append(f"to get it: {record.hint}")
    for line in lines:
        say(line)


def sweep(request: Request) -> int:
    """Measure the figure's cases here, draw them. 0 when all that could run was measured."""
    from memladder.sweeps.live import SweepView

    if request.results is not None:
        store.require_results(request.results)
    device = environment.resolve_device(request.device)
    names = request.framework_names
    shapes = request.workloads
    chosen = request.subjects()
    runnable, missing = api.available(names, device)
    cases = sweep_cases.select(chosen, runnable, shapes, device, request.layers)
    kept = store.Store(request.log)
    console = plain_console(stderr=True)
    with kept.locked():
        for folder in ("png", "pdf"):
            writable_folder(request.output_dir / folder)
        _tell_missing(missing, device, console)
        if not cases:
            raise UsageError(f"none of the frameworks {', '.join(names)} can run on {device} here")
        with SweepView(cases, request.repeats, console) as view:
            outcome = serial.sweep(cases, chosen, kept, request.options(), view)
    absent = sweep_cases.select(chosen, missing, shapes, device, request.layers)
    records = [*outcome.records, *api.unavailable(absent)]
    if request.results is not None:
        told = store.merge_results(
            request.results, list(outcome.records), list(outcome.verifications)
        )
        for line in told:
            say(f"warning: {line}")
    _draw(records, outcome.verifications, request.output_dir)
    _report(records, outcome.verifications, request.output_dir)
    return 0 if outcome.succeeded else 1


def _report(
    records: Sequence[Record], verifications: Sequence[Verification], output_dir: Path
) -> None:
    from memladder.paper import page
    from memladder.reports.html.rows import Shown

    out = output_dir / "report.html"
    page.write([Shown("this sweep", tuple(records), tuple(verifications))], out)
    print(out)


def _tell_missing(names: Sequence[str], device: str, console: Console) -> None:
    for name in names:
        found = sweep_cases.availability(name, device)
        hint = f"; to get it: {found.install}" if found.install else ""
        console.print(
            f"{name} can't run on {device} here: {found.reason}{hint}",
            style="dim",
        )


def verify(request: Request) -> int:
    """Compare frameworks with the reference; 0 when all agree."""
    device = environment.resolve_device(request.device)
    names = request.framework_names
    runnable, missing = api.available(names, device)
    planned = [name for name in runnable if sweep_cases.availability(name, device).plans]
    runnable = [name for name in runnable if name not in planned]
    console = plain_console(stderr=True)
    _tell_missing([*missing, *planned], device, console)
    if not runnable:
        raise UsageError(f"none of the frameworks {', '.join(names)} can run on {device} here")
    options = request.options()
    kept = store.Store(request.log)
    table = Table("framework", "model")
    printing.add_numbers(table, "shape", "tokens", "error", "tolerance", "agrees", "SQNR, dB")
    structure = Table("framework", "model", "shape", "agrees", "held, as the output can't be read")
    agree = True
    with kept.locked():
        for name in runnable:
            with telling(name, console) as tell:
                verification = runner.verify(
                    name,
                    frameworks.get(name),
                    device,
                    cache_dir=options.cache_dir,
                    limits=options.limits,
                    log_path=kept.log_path(f"verification_{name}"),
                    on_event=tell,
                )
            kept.save(verification)
            agree = agree and verification.agrees
            for check in verification.checks:
                _tell_reason(name, check, console)
                table.add_row(
                    name,
                    check.model,
                    str(check.shape),
                    str(check.tokens),
                    f"{check.error:.2e}",
                    f"{check.tolerance:.1e}",
                    "yes" if check.agrees else "NO",
                    "" if check.sqnr_db is None else f"{check.sqnr_db:.1f}",
                )
            for held in verification.structure or ():
                agrees = "yes" if held.agrees else "NO"
                structure.add_row(name, held.model, str(held.shape), agrees, held.explain())
    for one in (table, structure):
        one.columns[0].no_wrap = True
        if one.row_count:
            printing.print_table(plain_console(), one)
    return 0 if agree else 1


def _tell_reason(name: str, check: Check, console: Console) -> None:
    """What the table can't say of a check that does not agree."""
    where = f"{name}, {check.model} {check.shape}"
    if math.isnan(check.error):
        console.print(f"{where}: the output holds NaN or infinity: values beyond its dtype")
    elif not check.keeps_the_layer:
        console.print(
            f"{where}: {check.quantisation_error:.2e} is lost of the true layer, where its number "
            f"format explains {check.quantisation_tolerance:.1e}: its weights are others"
        )


def tune(request: Request) -> int:
    """Measure the cuts of Ladder's kernels on a GPU and keep the fastest; 0 when that was done."""
    device = environment.resolve_device(request.device)
    if device == "cpu":
        raise UsageError("tune measures a GPU's kernels; --device cpu has none")
    names = request.framework_names
    runnable, missing = api.available([name for name in names if name.startswith("ladder")], device)
    _tell_missing(missing, device, plain_console(stderr=True))
    if not runnable:
        raise UsageError(f"none of {', '.join(names)} is a Ladder that can run on {device} here")
    import torch

    from memladder import __version__, formats
    from memladder.engine.compile import layers
    from memladder.engine.packed import packed_layer
    from memladder.engine.run import tuner
    from memladder.frameworks.ladder import Ladder
    from memladder.kernels.cuda import tuning

    torch.cuda.set_device(torch.device(device))
    cache_dir = request.options().cache_dir
    file = tuning.path(cache_dir, __version__)
    tuning.load(file)
    shapes = request.workloads
    cases = [
        (config, variant, shape)
        for config in [one.config for one in request.subjects().values()]
        for variant in map(frameworks.get, runnable)
        for shape in shapes
    ]
    with progress_bar("tuning") as progress:
        for number, (config, variant, shape) in enumerate(cases):
            progress(number, len(cases))
            assert isinstance(variant, Ladder)
            path = layers.ensure_packed(config, formats.get(variant.weight), cache_dir, 0)
            tuner.tune(packed_layer.load(path), shape, variant.activation_format(), _tell_cut)
            tuning.save(file)
    print(f"{file}: {len(tuning.preferred())} cuts differ from the shipped ones")
    return 0


def _tell_cut(key: str, cut: str, shipped_s: float, best_s: float) -> None:
    print(f"{key}: {1e6 * shipped_s:.1f} µs → {1e6 * best_s:.1f} µs with {cut}")


def show_frameworks(device: str) -> None:
    """Print what can run on the device here, and what is missing for the rest."""
    resolved = environment.resolve_device(device)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, is_firm in (
        ("key", True),
        ("system", False),
        (f"on {resolved}", True),
        ("version", True),
        ("why not", False),
        ("to get it", False),
    ):
        table.add_column(column, overflow="fold", no_wrap=is_firm)
    for name in sweep_cases.parse_frameworks("all", first=rows.SYSTEMS):
        found = sweep_cases.availability(name, resolved)
        table.add_row(
            name,
            frameworks.get(name).title,
            "planned" if found.plans else "yes" if found.available else "no",
            found.version or "",
            found.reason or "",
            found.install or "",
        )
    printing.print_table(plain_console(), table)


def show_record(path: Path) -> None:
    """Print one record for a person."""
    from memladder.reports import show

    contents = store.read(path)
    if path.is_dir() or len(contents.records) != 1:
        raise UsageError(f"{path} is not one record; `memladder table {path}` prints many")
    show.print_record(contents.records[0], plain_console())


def print_table(path: Path, form: str) -> None:
    """Print a row a case as Markdown, CSV or JSON."""
    from memladder.paper.published import published
    from memladder.reports import table

    writers = {"md": table.to_markdown, "csv": table.to_csv, "json": table.to_json}
    if form not in writers:
        raise UsageError(f"format {form!r} is not one of {', '.join(writers)}")
    found = _read_store(path)
    known = {} if _custom(found.records) else published().values
    print(writers[form](table.rows(found.records, known, found.verifications)), end="")


def show_floor(path: Path) -> int:
    """Print the engine's measured cells against their budget; 1 when one is beyond its bound."""
    from memladder.reports import budget

    records = _read_store(path).records
    tables = [
        found for device in ("cpu", "cuda") if (found := budget.rows(records, device, _left_out))
    ]
    if not tables:
        raise UsageError(f"{path} holds no measured cell of ladder")
    print("\n".join(map(budget.to_markdown, tables)), end="")
    return 0 if all(row.holds for rows in tables for row in rows) else 1


def doctor() -> int:
    """Print what this machine has and what to fix; 1 when something needs fixing."""
    from memladder.checks.doctor import findings

    table = Table("what", "found", "to fix it")
    found = findings()
    for finding in found:
        style = None if finding.good else "yellow"
        table.add_row(finding.subject, finding.text, finding.fix or "", style=style)
    printing.print_table(plain_console(), table)
    return 0 if all(finding.good for finding in found) else 1


def calibrate(device: str, output_dir: Path) -> int:
    """Print what the meter reads of known sizes; 1 when one is out of bounds."""
    from memladder.checks import calibration

    resolved = environment.resolve_device(device)
    kept = store.Store(output_dir / "log")
    table = Table("device")
    printing.add_numbers(table, "allocated", "read", "difference", "bound", "holds")
    holds = True
    with kept.locked():
        for reading in calibration.calibrate(resolved, kept.log_path("calibration")):
            holds = holds and reading.holds
            table.add_row(
                reading.device,
                format_bytes(reading.asked_bytes),
                format_bytes(reading.read_bytes),
                f"{mib(reading.read_bytes - reading.asked_bytes):+.2f} MiB",
                format_bytes(reading.bound_bytes),
                "yes" if reading.holds else "NO",
            )
    printing.print_table(plain_console(), table)
    return 0 if holds else 1


def _left_out(line: str) -> None:
    say(f"warning: {line}; left out")


def _read_store(path: Path) -> store.Contents:
    contents = store.read(path)
    for line in contents.complaints():
        _left_out(line)
    return contents


@contextmanager
def needed(command: str, extra: str) -> Iterator[None]:
    """A library that is not here is one line that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{command} needs {error.name}", f"pip install 'memladder[{extra}]'"
        ) from None


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar with the time that is left, where stderr is a terminal; it goes away afterwards."""
    from rich.progress import Progress as Bar

    console = plain_console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
