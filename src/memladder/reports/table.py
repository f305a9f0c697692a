"""Records as rows, for people (Markdown) and for programs (CSV, JSON). MiB have one decimal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from memladder.core.record import Record, Status
from memladder.core.units import format_bytes, mib
from memladder.core.verification import Verification
from memladder.reports.cells import ensure_one_machine, is_wrong, plain_name, representative
from memladder.reports.style import WRONG

Value = str | int | float | None

_FORMULA_STARTS = ("=", "+", "-", "@")
_MEANINGS = {
    Status.MEASURED: "ran here, and its memory was read from outside",
    Status.PLANNED: "a real compiler's own plan, not run",
    Status.PREDICTED: "computed from shapes alone",
    Status.OOM: "ran out of memory",
    Status.BUSY: "others held the memory that it needed; the same command tries it again",
    Status.UNAVAILABLE: "can't run on this machine",
    Status.FAILED: "ended with an error",
    Status.TIMEOUT: "took longer than allowed",
}


@dataclass(frozen=True)
class Row:
    """One case. The order of the fields is the order of the columns, everywhere.

    `device` is where it ran, or what it is planned for. `over_import_mib` is what a process on the
    CPU takes in its steady state beyond its imported libraries. `asked_mib` is what a plan or
    prediction asks for, or the allocation that ran out of memory.
    """

    id: str
    model: str
    framework: str
    batch_size: int
    seq_len: int
    device: str
    status: str
    steady_mib: float | None
    peak_mib: float | None
    over_import_mib: float | None
    spread_percent: float | None
    asked_mib: float | None
    published_mib: int | None
    reason: str | None


COLUMNS = tuple(field.name for field in fields(Row))


def rows(
    records: Iterable[Record],
    published: Mapping[str, int],
    verifications: Sequence[Verification] = (),
) -> tuple[Row, ...]:
    """A row a record, in the records' order, beside MiB that were published of its case.

    What a framework took that computes another function, by its verification, is no number.
    """
    return tuple(
        _row(record, published.get(record.case.id), is_wrong(record, verifications))
        for record in records
    )


def to_markdown(table: Iterable[Row]) -> str:
    """A GitHub table with numbers to the right."""
    numbers = {field.name for field in fields(Row) if "int" in field.type or "float" in field.type}
    return _markdown(COLUMNS, (_values(row) for row in table), numbers)


def to_csv(table: Iterable[Row]) -> str:
    """CSV with a header. No text can start a formula: such a one gets a leading apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in table:
        writer.writerow(
            [_harmless(value) if isinstance(value, str) else _text(value) for value in _values(row)]
        )
    return file.getvalue()


def to_json(table: Iterable[Row]) -> str:
    """A JSON list of objects; what there is no number for is null."""
    return json.dumps([asdict(row) for row in table], indent=1, allow_nan=False) + "\n"


def to_markdown_report(
    records: Sequence[Record],
    verifications: Sequence[Verification],
    published: Mapping[str, int],
) -> str:
    """The page beside the figure: machine, table, what is missing, verification, settings.

    Raises UsageError when the records are of different machines.
    """
    ensure_one_machine(records)
    ran = [record for record in records if record.status is not Status.UNAVAILABLE]
    sections = [
        "# Memory of one decoder layer",
        _environment(records),
        "## Cases",
        to_markdown(rows(ran, published, verifications)),
        _legend(ran),
        *_plans(ran),
        "## Not available here",
        _unavailable(records),
        "## Verification",
        _verification(verifications),
        "## Settings",
        _settings(records),
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def _row(record: Record, published_mib: int | None, wrong: bool) -> Row:
    case = record.case
    reason = WRONG if wrong else record.reason

    def took(size: int | None) -> float | None:
        return None if wrong else _mib(size)

    return Row(
        id=case.id,
        model=case.model,
        framework=case.framework,
        batch_size=case.shape.batch_size,
        seq_len=case.shape.seq_len,
        device=_one_line(record.plan.target if record.plan else record.environment.machine.device),
        status=record.status.value,
        steady_mib=took(record.steady_bytes),
        peak_mib=took(record.peak_bytes),
        over_import_mib=took(record.over_import_bytes),
        spread_percent=None if wrong or record.spread is None else round(100 * record.spread, 1),
        asked_mib=_mib(record.asked_bytes),
        published_mib=published_mib,
        reason=None if reason is None else _one_line(reason),
    )


def _mib(size: int | None) -> float | None:
    return None if size is None else round(mib(size), 1)


def _values(row: Row) -> list[Value]:
    return [getattr(row, name) for name in COLUMNS]


def _text(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    """White space of any kind to single spaces, and no control characters."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table too."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for letter in "|`*[]~":
        text = text.replace(letter, f"\\{letter}")
    # An underscore inside a word is plain text in GitHub's dialect, and case ids stay searchable.
    return text.replace("__", "\\_\\_")


def _markdown(
    columns: Sequence[str], lines: Iterable[Sequence[Value]], numbers: Iterable[str] = ()
) -> str:
    right = set(numbers)
    head = [columns, ["---:" if column in right else "---" for column in columns]]
    body = [[_escaped(_one_line(_text(value))) for value in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *body])


def _environment(records: Sequence[Record]) -> str:
    if not records:
        return "No records."
    machine = representative(records).environment.machine
    environments = [record.environment for record in records]
    machines = [record.environment.machine for record in records if record.plan is None]
    # Memory may differ a little between starts of the same machine: one size stands for all.
    machines = machines or [machine]
    hosts = sorted({one.cores: one.memory_bytes for one in machines}.items())
    sizes = " and ".join(f"{cores} cores, {format_bytes(memory)}" for cores, memory in hosts)
    packages: dict[str, set[str]] = {}
    for environment in environments:
        for name, version in environment.packages.items():
            packages.setdefault(name, set()).add(version)
    facts = {
        "Device": f"{machine.device}, {format_bytes(machine.device_memory_bytes)}",
        "Driver": machine.driver,
        "CUDA": machine.cuda,
        "Processor": f"{machine.cpu}, {sizes}",
        "System": f"{machine.os}, {' and '.join(sorted({one.kernel for one in machines}))}",
        "Python": ", ".join(sorted({environment.python_label for environment in environments})),
        "memladder": ", ".join(sorted({environment.memladder for environment in environments})),
        "Packages": ", ".join(
            f"{name} {' and '.join(sorted(versions))}"
            for name, versions in sorted(packages.items())
        ),
    }
    return "\n".join(
        f"- {name}: {_escaped(_one_line(text))}" for name, text in facts.items() if text
    )


def _legend(records: Iterable[Record]) -> str:
    seen = {record.status for record in records}
    meanings = [f"*{status}*: {_MEANINGS[status]}" for status in Status if status in seen]
    return "; ".join([*meanings, "sizes in MiB (2^20 bytes)"]) + "."


def _plans(records: Iterable[Record]) -> list[str]:
    """What each plan consists of; nothing where there is none."""
    lines = [
        (
            record.case.id,
            record.plan.compiler,
            record.plan.target,
            "; ".join(f"{plain_name(n)} {mib(size):.1f}" for n, size in record.plan.parts.items()),
            "; ".join(
                f"{plain_name(n)} {mib(size):.1f}" for n, size in record.plan.assumed.items()
            ),
            f"{mib(record.plan.nbytes):.1f}",
        )
        for record in records
        if record.plan is not None
    ]
    columns = ("id", "compiler", "planned for", "parts, MiB", "assumed, MiB", "sum, MiB")
    return ["## Planned, not run", _markdown(columns, lines, ("sum, MiB",))] if lines else []


def _unavailable(records: Iterable[Record]) -> str:
    found = {
        (record.case.framework, record.reason or "", record.hint or ""): None
        for record in records
        if record.status is Status.UNAVAILABLE
    }
    if not found:
        return "Nothing that was asked for is missing."
    return _markdown(("framework", "why", "to get it"), found)


def _verification(verifications: Sequence[Verification]) -> str:
    lines = [
        (
            item.framework,
            item.environment.machine.device,
            check.model,
            str(check.shape),
            str(check.tokens),
            f"{check.error:.2e}",
            f"{check.tolerance:.2e}",
            _yes(check.agrees),
            None if check.sqnr_db is None else f"{check.sqnr_db:.1f}",
        )
        for item in verifications
        for check in item.checks
    ]
    structure = _structure(verifications)
    if not lines:
        return structure or "No framework's output was compared with the reference."
    columns = (
        *("framework", "device", "model", "shape", "tokens"),
        *("error", "tolerance", "agrees", "sqnr_db"),
    )
    note = (
        "Error: ‖y − ref‖ / ‖ref‖ against the fp32 reference, over the leading tokens. Where "
        "weights are quantised, the reference has the same quantised weights, and sqnr\\_db is the "
        "output's ratio of signal to quantisation noise against the true layer."
    )
    compared = f"{_markdown(columns, lines, ('tokens', 'error', 'tolerance', 'sqnr_db'))}\n{note}"
    return f"{compared}\n\n{structure}" if structure else compared


def _structure(verifications: Iterable[Verification]) -> str:
    """The checks of frameworks whose output can't be read; empty where there are none."""
    lines = [
        (item.framework, check.model, str(check.shape), _yes(check.agrees), check.explain())
        for item in verifications
        for check in item.structure or ()
    ]
    if not lines:
        return ""
    note = "These frameworks keep a layer's output to themselves: what they hold is compared."
    return f"{_markdown(('framework', 'model', 'shape', 'agrees', 'held'), lines)}\n{note}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _settings(records: Iterable[Record]) -> str:
    found: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        for name, value in record.settings.items():
            found.setdefault((record.case.framework, name), {})[str(value)] = None
    if not found:
        return "No framework listed any."
    lines = [(framework, name, ", ".join(values)) for (framework, name), values in found.items()]
    return _markdown(("framework", "setting", "value"), lines)
