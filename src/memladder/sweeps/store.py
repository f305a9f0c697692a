"""Where records live: a folder such as `log/` (a file a case), or a results file (many in one).

Nothing that was measured is overwritten by something that is not its repetition: a record of
another environment or layer, or one that a failure would replace, moves to `previous/`, a file that
is not a record to `set_aside/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from memladder.core import serial
from memladder.core.errors import LockedError, RecordError, UsageError
from memladder.core.files import writable_folder, write_atomic
from memladder.core.record import (
    SCHEMA,
    Record,
    Verification,
    dumps,
    loads_record,
    loads_verification,
)

_VERIFICATION_PREFIX = "verification_"


@dataclass(frozen=True)
class Results:
    """The content of a results file."""

    records: tuple[Record, ...]
    verifications: tuple[Verification, ...]
    schema: int = SCHEMA


@dataclass
class Contents:
    """What a store held when it was read, and which files in it are not memladder's."""

    records: list[Record] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    foreign: dict[Path, str] = field(default_factory=dict)


class Store:
    """A folder with one JSON file a case, `<case id>.json`, and one a verified framework."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record_path(self, case_id: str) -> Path:
        """The file of a case's record."""
        return self.folder / f"{case_id}.json"

    def log_path(self, name: str) -> Path:
        """The file of a worker's output."""
        return self.folder / f"{name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one measuring process. Raises LockedError, UsageError."""
        writable_folder(self.folder)
        lock = filelock.FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise LockedError(
                f"another memladder is measuring into {self.folder}; "
                "wait for it, or choose another --output-dir"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def read(self) -> Contents:
        """Everything in the folder; a file that can't be read as a record is listed as foreign."""
        contents = Contents()
        for path in sorted(self.folder.glob("*.json")):
            try:
                if path.name.startswith(_VERIFICATION_PREFIX):
                    contents.verifications.append(loads_verification(path.read_text()))
                else:
                    contents.records.append(_read_record(path))
            except (RecordError, OSError, UnicodeDecodeError) as error:
                contents.foreign[path] = _one_line(error)
        return contents

    def set_aside(self, path: Path) -> Path:
        """Move a foreign file out of the way, keeping it; where it went."""
        target = _free_name(self.folder / "set_aside" / path.name)
        _move(path, target)
        return target

    def save(self, item: Record | Verification) -> Path:
        """Write a record or verification; what it replaces is kept if it is of another kind."""
        if isinstance(item, Verification):
            path = self.folder / f"{_VERIFICATION_PREFIX}{item.framework}.json"
        else:
            path = self.record_path(item.case.id)
            self._keep_previous(path, item)
        write_atomic(path, dumps(item))
        return path

    def _keep_previous(self, path: Path, successor: Record) -> None:
        if not path.exists():
            return
        try:
            previous = _read_record(path)
        except (RecordError, OSError, UnicodeDecodeError):
            self.set_aside(path)
            return
        if previous.runs and not (successor.runs and repeats(previous, successor)):
            digest = hashlib.sha256(dumps(previous).encode()).hexdigest()[:8]
            _move(path, self.folder / "previous" / f"{path.stem}.{digest}.json")


def repeats(old: Record, new: Record) -> bool:
    """Is `new` the same measurement as `old`: same case, layer and environment?"""
    return (
        old.case == new.case
        and (old.layer and old.layer.digest) == (new.layer and new.layer.digest)
        and old.environment.same_as(new.environment)
    )


def read(path: Path) -> Contents:
    """The records in a folder, a results file, or a single record's file. Raises UsageError."""
    if path.is_dir():
        return Store(path).read()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {_one_line(error)}") from None
    try:
        return Contents(records=[loads_record(text)])
    except RecordError as not_a_record:
        try:
            results = _loads_results(text)
        except RecordError:
            raise UsageError(f"{path}: {not_a_record}") from None
    return Contents(list(results.records), list(results.verifications))


def merge_results(path: Path, records: list[Record], verifications: list[Verification]) -> None:
    """Add records to a results file, replacing those of the same case and layer.

    A case that ended without a measurement never replaces one that was measured.
    """
    old = read(path) if path.exists() else Contents()
    kept = {_key(record): record for record in old.records}
    for record in records:
        if record.runs or not (_key(record) in kept and kept[_key(record)].runs):
            kept[_key(record)] = record
    verified = {item.framework: item for item in old.verifications}
    verified.update({item.framework: item for item in verifications})
    results = Results(
        tuple(kept[key] for key in sorted(kept)),
        tuple(verified[key] for key in sorted(verified)),
    )
    write_atomic(path, _dumps_results(results))


def _key(record: Record) -> tuple[str, str, str]:
    """What a record is the only one of. A plan is of its target, wherever it was made."""
    place = record.case.device if record.plan is None else record.plan.target
    return record.case.id, place, record.layer.digest if record.layer else ""


def _dumps_results(results: Results) -> str:
    """A line a record: small enough to ship, and a changed record is a changed line."""

    def lines(items: tuple[Record, ...] | tuple[Verification, ...]) -> str:
        return ",\n".join(json.dumps(serial.to_json(item), separators=(",", ":")) for item in items)

    return (
        f'{{"schema":{results.schema},\n"records":[\n{lines(results.records)}\n],\n'
        f'"verifications":[\n{lines(results.verifications)}\n]}}\n'
    )


def _loads_results(text: str) -> Results:
    try:
        results = serial.from_json(Results, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not a memladder results file: {error}") from None
    if results.schema != SCHEMA:
        raise RecordError(f"schema {results.schema} is not {SCHEMA}, the one this version reads")
    return results


def _read_record(path: Path) -> Record:
    record = loads_record(path.read_text())
    if record.case.id != path.stem:
        raise RecordError(f"holds {record.case.id}, not {path.stem}")
    return record


def _free_name(path: Path) -> Path:
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _move(path: Path, target: Path) -> None:
    writable_folder(target.parent)
    try:
        path.replace(target)
    except OSError as error:
        raise UsageError(f"cannot move {path} to {target}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())
