"""`memladder cache`: what was made and kept, whether it is as it was made, and removing it."""

from __future__ import annotations

import shutil
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from memladder.cli.console import plain_console
from memladder.core import digests, serial
from memladder.core.errors import UsageError
from memladder.core.text import shown
from memladder.core.units import format_bytes, mib
from memladder.models import cache
from memladder.reports.printing import add_numbers, print_table

# By place below the cache folder: what each file is, the first that fits.
_FILES = (
    ("weights", "*/weights.safetensors"),
    ("packed", "*/packed-*.safetensors"),
    ("graph", "*/layer-*.onnx"),
    ("engine", "*/layer-*.engine"),
    ("gguf", "*/layer-*.gguf"),
    ("outline", "*/outline-*.onnx"),
    ("layer", "*/layer-*.json"),
    ("model", "models/*.json"),
    ("tuning", "tuning/*.json"),
)
# Folders of others' making, without digests: compiled code, and what vLLM keeps.
_FOLDERS = ("triton", "inductor", "vllm")
KINDS = (*(kind for kind, _ in _FILES), *_FOLDERS)
ALL = "all"
_DAY_S = 86_400


@dataclass(frozen=True)
class Entry:
    """One file, or one folder of others' making. `model` is the folder's name, which begins with
    it; `fault` what is wrong with it, None where nothing is, or nothing was asked."""

    kind: str
    model: str
    path: str
    bytes: int
    age_s: int
    fault: str | None = None


def show_cache(
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all files; exit 1 if one is not as made.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete what --kind and --older-than choose.")
    ] = False,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND,…|all", help=f"Of {', '.join(KINDS)}.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="DAYS", help="Not written for so many days.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: MEMLADDER_CACHE.")
    ] = None,
) -> None:
    """List the files that were made and kept; hold them against their digests, or remove them."""
    if remove and kind is None and older_than is None:
        raise UsageError("--remove takes --kind, --older-than or both; --kind all is everything")
    if remove and verify:
        raise UsageError("--verify and --remove are given; give one of them")
    kinds = _kinds(kind)
    least_s = _days(older_than) * _DAY_S
    root = (cache_dir or cache.default_dir()).absolute()
    found = [e for e in entries(root) if e.kind in kinds and e.age_s >= least_s]
    if remove:
        for entry in found:
            _remove(root, entry)
    if verify:
        found = [_verified(root, entry) for entry in found]
    if as_json:
        print(serial.dumps({"folder": str(root), "entries": found}, indent=1))
    else:
        _print(root, found, removed=remove)
    faults = [entry for entry in found if entry.fault is not None]
    for entry in faults:
        sys.stderr.write(f"{shown(root / entry.path)} {entry.fault}\n")
    if verify and not as_json and not faults:
        print("all are as they were made")
    raise typer.Exit(1 if faults else 0)


def entries(root: Path) -> list[Entry]:
    """What lies in the cache folder, by kind and place. No link is followed."""
    found = []
    for folder in _listed(root):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            continue
        if folder.name in _FOLDERS:
            sizes = [one.lstat() for one in folder.rglob("*") if not one.is_dir()]
            newest = max((one.st_mtime for one in sizes), default=folder.lstat().st_mtime)
            nbytes = sum(one.st_size for one in sizes)
            found.append(Entry(folder.name, "", folder.name, nbytes, _age(newest)))
            continue
        for path in _listed(folder):
            place = f"{folder.name}/{path.name}"
            kind = next((kind for kind, form in _FILES if fnmatchcase(place, form)), None)
            one = path.lstat()
            if kind is not None and stat.S_ISREG(one.st_mode):
                model = "" if kind in ("model", "tuning") else folder.name
                found.append(Entry(kind, model, place, one.st_size, _age(one.st_mtime)))
    return sorted(found, key=lambda entry: (KINDS.index(entry.kind), entry.path))


def _listed(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{shown(folder)}: {error.strerror or error}") from None


def _age(written: float) -> int:
    return max(0, int(time.time() - written))


def _verified(root: Path, entry: Entry) -> Entry:
    if entry.kind in _FOLDERS:
        return entry
    fault = digests.fault(root / entry.path, full=True)
    return Entry(entry.kind, entry.model, entry.path, entry.bytes, entry.age_s, fault)


def _remove(root: Path, entry: Entry) -> None:
    path = root / entry.path
    try:
        if entry.kind in _FOLDERS:
            # Of links it removes the links.
            shutil.rmtree(path)
            return
        with cache.writing(path.parent):
            path.unlink(missing_ok=True)
            digests.beside(path).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot remove {shown(path)}: {error.strerror or error}") from None


def _print(root: Path, found: list[Entry], *, removed: bool) -> None:
    table = Table("kind", "model", "file")
    add_numbers(table, "MiB", "days")
    for entry in found:
        name = shown(Path(entry.path).name)
        size, age = f"{mib(entry.bytes):,.3f}", f"{entry.age_s / _DAY_S:,.1f}"
        table.add_row(entry.kind, shown(entry.model), name, size, age)
    if found:
        print_table(plain_console(), table)
    total = format_bytes(sum(entry.bytes for entry in found))
    print(f"{shown(root)}: {len(found)} {'removed' if removed else 'there'}, {total}")


def _kinds(text: str | None) -> tuple[str, ...]:
    if text is None or text == ALL:
        return KINDS
    kinds = tuple(part.strip() for part in text.split(","))
    unknown = [part for part in kinds if part not in KINDS]
    if unknown:
        raise UsageError(f"unknown kind {unknown[0][:40]!r}; known: {', '.join(KINDS)}, {ALL}")
    return kinds


def _days(text: str | None) -> float:
    try:
        days = 0.0 if text is None else float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < 1e6:
        raise UsageError(f"older-than {str(text)[:40]!r} is not a number of days from 0")
    return days
