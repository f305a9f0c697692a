"""Where made files live: weights and exported graphs, one folder a layer and seed.

A graph, and a compiled layer, has its SHA-256 in a file beside it: one that was cut or altered is
made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memladder.core.errors import CacheError, UsageError
from memladder.core.units import format_bytes
from memladder.models import LayerConfig

# Room left for the file system itself.
_SPARE_BYTES = 64 << 20


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
    """The folder of what is known of a layer without its weights."""
    return cache_dir / f"{config.model}-{config.digest}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder for writing; a second process waits. Raises CacheError if it can't be."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
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
    """A name to write to; it becomes `path` when all went well and is removed otherwise."""
    part = path.with_name(path.name + ".part")
    # What a killed process has left, or a link that somebody has laid.
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, written by `make` where it is not there or not as it was made.

    Raises what `make` raises, and CacheError where the folder can't be written.
    """
    if is_whole(path):
        return path
    with writing(path.parent):
        # Another process may have been quicker.
        if not is_whole(path):
            with replacing(path) as part:
                make(part)
                digest = _digest(part)
            with replacing(_beside(path)) as part:
                part.write_text(digest, encoding="ascii")
    return path


def is_whole(path: Path) -> bool:
    """Is the file there, as `made` has written it?"""
    try:
        return _digest(path) == _beside(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


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
