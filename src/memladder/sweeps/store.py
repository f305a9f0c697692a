"""Where records live: a folder such as `log/` (a file a case), or a results file (many in one).

Nothing that was measured is overwritten by something that is not its repetition: a record of
another environment or layer, or one that a failure would replace, moves to `previous/`, a file that
is not a record to `set_aside/`. Devices do not share a record: the second device's files bear its
name beside the case's.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from memladder.core import serial
from memladder.core.case import Case
from memladder.core.errors import MemladderError, RecordError, UsageError
from memladder.core.files import locked, read_regular, writable_folder, write_atomic
from memladder.core.record import SCHEMA, Record, dumps, loads_record
from memladder.core.verification import Verification, loads_verification

T = TypeVar("T")

_VERIFICATION_PREFIX = "verification_"
# A record has 2000 points of trace at the most, some 200 KB.
_MOST_RECORD_BYTES = 1 << 24
_MOST_RESULTS_BYTES = 1 << 29
_LOCK_S = 60.0
_TOLD = 3


@dataclass
class Contents:
    """What a store held when it was read: `foreign` files in it are not memladder's, `damaged`
    names entries of a results file that are no records."""

    records: list[Record] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    foreign: dict[Path, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """A line for each thing that could not be read."""
        files = [
            f"{path} is not a record of memladder ({why})" for path, why in self.foreign.items()
        ]
        return [*files, *self.damaged]


class Store:
    """A folder with one JSON file a case, `<case id>.json`, and one a verified framework.

    Where that file is of another device, it is `<case id>.<device>.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record_path(self, case_id: str) -> Path:
        """The file of a case's record, on the first device that it was measured on."""
        return self.folder / f"{case_id}.json"

    def name(self, case: Case) -> str:
        """What the files of a case are called, without `.json` or `.log`."""
        return self._name(case.id, case.device)

    def log_path(self, name: str) -> Path:
        """The file of a worker's output."""
        return self.folder / f"{name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one measuring process. Raises LockedError, UsageError."""
        writable_folder(self.folder)
        busy = (
            f"another memladder is measuring into {self.folder}; "
            "wait for it, or choose another --output-dir"
        )
        with locked(self.folder / ".lock", busy):
            yield

    def read(self) -> Contents:
        """Everything in the folder; a file that can't be read as a record is listed as foreign."""
        contents = Contents()
        for path in sorted(self.folder.glob("*.json")):
            try:
                if path.name.startswith(_VERIFICATION_PREFIX):
                    contents.verifications.append(_read_verification(path))
                else:
                    contents.records.append(_read_record(path))
            except RecordError as error:
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
            name = self._name(f"{_VERIFICATION_PREFIX}{item.framework}", item.device)
            path = self.record_path(name)
        else:
            path = self.record_path(self.name(item.case))
            self._keep_previous(path, item)
        write_atomic(path, dumps(item))
        return path

    def _name(self, name: str, device: str) -> str:
        first, own = self.record_path(name), f"{name}.{_slug(device)}"
        if self.record_path(own).exists():
            return own
        try:
            if name.startswith(_VERIFICATION_PREFIX):
                taken = _read_verification(first).device
            else:
                taken = _read_record(first).case.device
        except RecordError:
            return name
        return name if taken == device else own

    def _keep_previous(self, path: Path, successor: Record) -> None:
        if not path.exists():
            return
        try:
            previous = _read_record(path)
        except RecordError:
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
        text = _text(path, _MOST_RESULTS_BYTES)
    except RecordError as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    try:
        return Contents(records=[loads_record(text)])
    except RecordError as not_a_record:
        try:
            return _read_results(path, text)
        except RecordError:
            raise UsageError(f"{path}: {not_a_record}") from None


def require_results(path: Path) -> None:
    """Raise UsageError unless records can be merged into `path`, which need not exist."""
    writable_folder(path.parent)
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if path.exists():
        read(path)


def merge_results(
    path: Path, records: list[Record], verifications: list[Verification]
) -> tuple[str, ...]:
    """Add records to a results file, replacing any of the same case, machine and layer.

    A case that ended without a measurement never replaces one that was measured. Processes that
    merge at the same time wait for each other. A file with damaged entries is copied before they
    are left out; a line about it is returned. Raises LockedError, UsageError.
    """
    writable_folder(path.parent)
    busy = f"another memladder is merging into {path}"
    with locked(path.with_name(f".{path.name}.lock"), busy, _LOCK_S):
        old = read(path) if path.exists() else Contents()
        told = _copy_damaged(path, old)
        write_atomic(path, _merged(old, records, verifications))
    return told


def _copy_damaged(path: Path, old: Contents) -> tuple[str, ...]:
    if not old.damaged:
        return ()
    copy = _free_name(path.with_name(f"{path.name}.damaged"))
    shutil.copyfile(path, copy)
    some = "; ".join(old.damaged[:_TOLD])
    return (f"{len(old.damaged)} damaged entries left out ({some}); the file is kept as {copy}",)


def _merged(old: Contents, records: list[Record], verifications: list[Verification]) -> str:
    kept = {_key(record): record for record in old.records}
    for record in records:
        if record.runs or not (_key(record) in kept and kept[_key(record)].runs):
            kept[_key(record)] = record
    verified = {_verification_key(item): item for item in old.verifications}
    verified.update({_verification_key(item): item for item in verifications})
    return _dumps_results(
        [kept[key] for key in sorted(kept)], [verified[key] for key in sorted(verified)]
    )


def _key(record: Record) -> tuple[str, ...]:
    """What a record is the only one of. A plan is of its target, wherever it was made."""
    digest = record.layer.digest if record.layer else ""
    if record.plan is not None:
        return record.case.id, record.plan.target, "", digest
    return record.case.id, record.case.device, record.environment.machine.device, digest


def _verification_key(item: Verification) -> tuple[str, ...]:
    return item.framework, item.device, item.environment.machine.device


def _dumps_results(records: list[Record], verifications: list[Verification]) -> str:
    """A line a record: small enough to ship, and a changed record is a changed line."""

    def lines(items: list[Record] | list[Verification]) -> str:
        return ",\n".join(serial.dumps(item, separators=(",", ":")) for item in items)

    return (
        f'{{"schema":{SCHEMA},\n"records":[\n{lines(records)}\n],\n'
        f'"verifications":[\n{lines(verifications)}\n]}}\n'
    )


def _read_results(path: Path, text: str) -> Contents:
    """A results file; entries that are no records are `damaged`. Raises RecordError where none is
    a record."""
    try:
        data = serial.loads(text)
    except ValueError as error:
        raise RecordError(f"not a memladder results file: {error}") from None
    if not isinstance(data, dict) or sorted(data) != ["records", "schema", "verifications"]:
        raise RecordError("not a memladder results file")
    if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
        raise RecordError(f"its schema is not {SCHEMA}, the one this version reads")
    contents = Contents()
    contents.records = _entries(Record, "records", data, path, contents.damaged)
    contents.verifications = _entries(Verification, "verifications", data, path, contents.damaged)
    if contents.damaged and not contents.records and not contents.verifications:
        raise RecordError(contents.damaged[0])
    return contents


def _entries(
    kind: type[T], name: str, data: dict[str, object], path: Path, damaged: list[str]
) -> list[T]:
    listed = data[name]
    if not isinstance(listed, list):
        raise RecordError(f"not a memladder results file: {name} is no list")
    found = []
    for number, entry in enumerate(listed):
        try:
            found.append(serial.from_json(kind, entry, f"$.{name}[{number}]"))
        except (ValueError, MemladderError) as error:
            damaged.append(f"{path}: {name}[{number}] is damaged ({_one_line(error)})")
    return found


def _read_record(path: Path) -> Record:
    record = loads_record(_text(path, _MOST_RECORD_BYTES))
    case = record.case
    if path.stem not in (case.id, f"{case.id}.{_slug(case.device)}"):
        raise RecordError(f"holds {case.id}, not {path.stem}")
    return record


def _read_verification(path: Path) -> Verification:
    found = loads_verification(_text(path, _MOST_RECORD_BYTES))
    name = f"{_VERIFICATION_PREFIX}{found.framework}"
    if path.stem not in (name, f"{name}.{_slug(found.device)}"):
        raise RecordError(f"holds a verification of {found.framework}")
    return found


def _slug(device: str) -> str:
    """A device in a file's name: `cpu`, `cuda1`."""
    return device.replace(":", "")


def _text(path: Path, most_bytes: int) -> str:
    """A file's text. Raises RecordError, which does not name the file."""
    try:
        return read_regular(path, most_bytes, RecordError).decode()
    except RecordError as error:
        raise RecordError(str(error).removeprefix(f"{path}: ")) from None
    except UnicodeDecodeError as error:
        raise RecordError(_one_line(error)) from None


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
