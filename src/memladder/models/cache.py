"""Where made files live: weights and all that is made of them, one folder a layer and seed.

Each has its SHA-256 in a file beside it (`core.digests`): one that was cut or altered is made
again. What another user could have written is not used.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memladder.core import digests
from memladder.core.errors import CacheError, UsageError
from memladder.core.files import require_own
from memladder.core.units import format_bytes
from memladder.models import LayerConfig

# Room left for the file system itself.
_SPARE_BYTES = 64 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_dir() -> Path:
    """`MEMLADDER_CACHE`, else the platform's folder for caches. Raises UsageError where this user
    has none: no HOME, and no entry among the system's users."""
    given = os.environ.get("MEMLADDER_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and sys.platform != "darwin":
        return Path(base) / "memladder"
    try:
        home = Path.home()
    except RuntimeError:
        raise UsageError("this user has no home folder; set MEMLADDER_CACHE to a folder") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "memladder"


def layer_dir(config: LayerConfig, cache_dir: Path, seed: int) -> Path:
    """The folder of one layer's weights and of the graphs that use them."""
    return cache_dir / f"{config.model}-{config.digest}-seed{seed}"


def graph_dir(config: LayerConfig, cache_dir: Path) -> Path:
    """The folder of a layer's files beside its weights."""
    return cache_dir / f"{config.model}-{config.digest}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder for writing; a second process waits. Raises CacheError if it can't be, and
    UsageError where another user could have written there."""
    from filelock import FileLock

    try:
        if not folder.parent.exists():
            folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)
        require_ours(folder)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise CacheError(f"cache folder {folder} can't be written: {_reason(error)}") from None
    try:
        yield
    except OSError as error:
        raise CacheError(f"cache folder {folder}: {_reason(error)}") from None
    finally:
        lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path`, with its digest beside it, when all went well and is
    removed otherwise."""
    part = path.with_name(path.name + ".part")
    # What a killed process has left, or a link that somebody has laid.
    part.unlink(missing_ok=True)
    digests.beside(part).unlink(missing_ok=True)
    try:
        yield part
        digests.moved(part, path)
    finally:
        part.unlink(missing_ok=True)
        digests.beside(part).unlink(missing_ok=True)


def made(
    path: Path,
    make: Callable[[Path], object],
    *,
    nbytes: int = 0,
    fits: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """`path`, written by `make` where it is not there, or not as it was made: which is told.

    `nbytes` are needed on the disk; `fits` looks at what the digest can't tell: is it the file that
    would be made now? Raises what `make` raises, CacheError where the folder can't be written, and
    UsageError where another user could have written file or folder.
    """
    if _fault(path, fits) is None:
        return path
    with writing(path.parent):
        # Another process may have been quicker.
        found = _fault(path, fits)
        if found is not None:
            if path.exists():
                sys.stderr.write(f"warning: {path} {found}; it is made again\n")
            require_space(path.parent, nbytes)
            with replacing(path) as part:
                make(part)
                part.chmod(stat.S_IMODE(part.stat().st_mode) & ~_OTHERS_WRITE)
    return path


def is_whole(path: Path) -> bool:
    """Is the file there, as `made` has written it?"""
    return _fault(path, Path.is_file) is None


def require_ours(path: Path) -> None:
    """Raise UsageError where a file of the cache, its folder or the cache's own could have been
    written by another user than this one and root; what is not there yet is none's."""
    folder = path.parent.resolve()
    for one in (folder.parent, folder, folder / path.name, path.resolve()):
        with suppress(FileNotFoundError):
            require_own(one, one)


def _fault(path: Path, fits: Callable[[Path], bool]) -> str | None:
    if not path.exists():
        return "is not there"
    require_ours(path)
    return digests.fault(path) or (None if fits(path) else "was made otherwise")


def require_space(
    folder: Path,
    needed: int,
    what: str = "cache folder",
    advice: str = "set MEMLADDER_CACHE to a folder on a larger disk",
) -> None:
    """Raise CacheError unless `needed` bytes fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise CacheError(
            f"{what} {folder} needs {format_bytes(needed)}, only {format_bytes(free)} free; "
            f"{advice}"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
