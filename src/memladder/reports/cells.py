"""What the figure shows in each of its cells, decided from records before anything is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from memladder import frameworks
from memladder.core.case import Workload
from memladder.core.errors import UsageError
from memladder.core.record import Record, Source, Status
from memladder.core.units import format_bytes, mib
from memladder.core.verification import Verification
from memladder.reports.style import STATUS_TEXT, UNVERIFIED, WRONG

Key: TypeAlias = tuple[str, str, Workload]
"""Model, system (the framework's key), shape."""

_WITH_VALUE = (Status.MEASURED, Status.PLANNED, Status.PREDICTED)
# What the figure takes for granted, and a framework may not: the setting says what it did.
_DTYPE = "float16"
_SOURCES = {
    Source.NVML_PROCESS: "device memory of the process tree (NVML, per process)",
    Source.NVML_DEVICE_DELTA: "growth of the device's used memory (NVML)",
    Source.PSS: "memory of the process tree (PSS, from /proc)",
}


@dataclass(frozen=True)
class Cell:
    """One place of the figure: a value in MiB, or else a note that says why there is none."""

    value: float | None
    status: Status
    note: str = ""

    def __post_init__(self) -> None:
        if self.value is None:
            if not self.note:
                raise ValueError(f"a {self.status} cell with neither value nor note")
        elif self.status not in _WITH_VALUE or not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a {self.status} cell can't have the value {self.value}")


def cells_from(records: Sequence[Record], verifications: Sequence[Verification]) -> dict[Key, Cell]:
    """The figure's cells. A measured value counts only if its framework was found to agree.

    Raises UsageError when the measured records are of different machines, or the records of
    different configurations of a model, or when one holds a case twice: one picture can't show
    that honestly.
    """
    ensure_one_machine(records)
    _ensure_one_layer(records)
    cells: dict[Key, Cell] = {}
    for record in records:
        key = (record.case.model, record.case.framework, record.case.shape)
        if key in cells:
            raise UsageError(f"there are two records of {record.case.id}; a figure shows one")
        cells[key] = _cell(record, verifications)
    return cells


def ensure_one_machine(records: Sequence[Record]) -> None:
    """Raises UsageError, naming what differs, unless all records are of the same machine.

    A plan is a word on its own target, wherever it was made: planned records may be of another.
    What a process takes on a GPU does not depend on how many cores its host has, and builds of one
    version of a kernel (`6.1.0-13-amd64`, `6.1.0-18-amd64`) are taken for the same.
    """
    records = [record for record in records if record.plan is None]
    for record in records[1:]:
        first, other = records[0].environment.machine, record.environment.machine
        names = {
            field.name
            for field in fields(first)
            if field.compare and getattr(first, field.name) != getattr(other, field.name)
        }
        if "cpu" not in (records[0].case.device, record.case.device):
            names.discard("cores")
        if first.kernel.partition("-")[0] == other.kernel.partition("-")[0]:
            names.discard("kernel")
        if names:
            parts = (f"{n} {getattr(first, n)!r} and {getattr(other, n)!r}" for n in sorted(names))
            raise UsageError(
                f"records of different machines, {records[0].case.id} and {record.case.id}: "
                + "; ".join(parts)
            )


def system_label(system: str) -> str:
    """A system's name in figures: the framework's title, or else the key."""
    return frameworks.get(system).title if system in frameworks.names() else system


def plain_name(part: str) -> str:
    """A part of a plan as a person says it.

    >>> plain_name("cuda_context")
    'CUDA context'
    """
    return part.replace("_", " ").replace("cuda", "CUDA")


def representative(records: Sequence[Record]) -> Record:
    """A record that tells the machine of them all: one that is not planned, if there is any."""
    return next((record for record in records if record.plan is None), records[0])


def notes_from(records: Sequence[Record]) -> tuple[str, ...]:
    """The figure's footnotes: what the bars are, how and when they were measured."""
    return (*_measured_notes(records), *_planned_notes(records))


def _planned_notes(records: Sequence[Record]) -> tuple[str, ...]:
    """A line for each compiler and target: whose plan it is, and what in it is assumed."""
    found: dict[str, None] = {}
    for record in records:
        if (plan := record.plan) is not None:
            system = system_label(record.case.framework)
            assumed = " and ".join(
                f"{format_bytes(size)} of {plain_name(name)}" for name, size in plan.assumed.items()
            )
            found[
                f"{system} is planned by {plan.compiler} for {plan.target}, and did not run"
                + (f"; {assumed} are assumed in it." if assumed else ".")
            ] = None
    return tuple(found)


def _measured_notes(records: Sequence[Record]) -> tuple[str, ...]:
    runs = [run for record in records for run in record.runs]
    if not runs:
        return ("Nothing was measured.",)
    sources = " or ".join(_SOURCES[source] for source in sorted({run.source for run in runs}))
    days = sorted(run.started[:10] for run in runs)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    repeats = sorted({len(record.runs) for record in records if record.runs})
    times = " or ".join(map(str, repeats))
    how = "one process a case" if repeats == [1] else f"median of {times} processes a case"
    dtypes = {
        system_label(record.case.framework): f"{does} {dtype}"
        for record in records
        for name, does in (("dtype", "computes in"), ("matrix_dtype", "keeps its matrices in"))
        if (dtype := record.settings.get(name, _DTYPE)) != _DTYPE
    }
    others = "; ".join(f"{system} {what}" for system, what in dtypes.items())
    versions = ", ".join(sorted({record.environment.memladder for record in records}))
    polls = min(run.polls_per_s for run in runs)
    return (
        f"Bars: largest {sources} while the layer runs in a loop; {how}.",
        f"Measured {when} with memladder {versions}, {polls:.0f} polls a second or more.",
        *_base_notes(records),
        *((f"On this device {others}.",) if others else ()),
    )


def _base_notes(records: Sequence[Record]) -> tuple[str, ...]:
    """What of the bars is there before anything is loaded: it depends on how torch was built."""
    bases = sorted(base for record in records if (base := record.import_bytes) is not None)
    if not bases:
        return ()
    builds = sorted(
        {
            torch_build(version)
            for record in records
            if record.import_bytes is not None
            and (version := record.environment.packages.get("torch"))
        }
    )
    span = " to ".join(dict.fromkeys(format_bytes(base) for base in (bases[0], bases[-1])))
    by = f" ({', '.join(builds)})" if builds else ""
    return (f"Of each bar imported libraries take {span}{by}.",)


def torch_build(version: str) -> str:
    """A version of torch with what it was built for, as its tag tells.

    >>> torch_build("2.13.0+cpu"), torch_build("2.11.0+cu130")
    ('torch 2.13.0+cpu', 'torch 2.11.0+cu130, a CUDA build, which takes more')
    """
    is_for_gpus = re.search(r"\+(cu|rocm)\d", version)
    return f"torch {version}" + (", a CUDA build, which takes more" if is_for_gpus else "")


def device_label(records: Sequence[Record]) -> str:
    """The device of the records and, for a GPU, its driver. Raises UsageError as above."""
    if not records:
        raise UsageError("there are no records to show")
    ensure_one_machine(records)
    machine = representative(records).environment.machine
    driver = f", driver {machine.driver}" if machine.driver else ""
    return f"{machine.device}{driver}"


def _cell(record: Record, verifications: Sequence[Verification]) -> Cell:
    if record.status is Status.MEASURED:
        found = problem(record, verifications)
        assert record.steady_bytes is not None, "a measured record has runs"
        if found:
            return Cell(None, record.status, found)
        return Cell(mib(record.steady_bytes), record.status)
    note = STATUS_TEXT[record.status]
    if record.status in _WITH_VALUE and record.asked_bytes:
        return Cell(mib(record.asked_bytes), record.status, note)
    if record.status is Status.OOM and record.asked_bytes:
        note = f"{note}, asked for {format_bytes(record.asked_bytes)}"
    return Cell(None, record.status, note)


def problem(record: Record, verifications: Sequence[Verification]) -> str | None:
    """Why a measured record may not be drawn; None if its framework agrees on its model here."""
    case = record.case
    found = [
        item
        for item in verifications
        if (item.framework, item.device) == (case.framework, case.device)
        and item.environment.same_as(record.environment)
        and case.model in item.models
    ]
    if not found:
        return UNVERIFIED
    return None if all(item.agrees for item in found) else WRONG


def is_wrong(record: Record, verifications: Sequence[Verification]) -> bool:
    """Was it measured of a framework that computes another function, by its verification?"""
    return record.status is Status.MEASURED and problem(record, verifications) == WRONG


def _ensure_one_layer(records: Sequence[Record]) -> None:
    digests: Mapping[str, dict[str, str]] = {record.case.model: {} for record in records}
    for record in records:
        if record.layer is not None:
            digests[record.case.model].setdefault(record.layer.digest, record.case.id)
    for model, found in digests.items():
        if len(found) > 1:
            raise UsageError(
                f"records of different configurations of {model}: {', '.join(found.values())}"
            )
