"""The Python that a framework's workers start with."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memladder.core import serial
from memladder.core.errors import UsageError
from memladder.core.files import require_own, writable_folder
from memladder.models.cache import default_dir

MADE_FILE = "memladder.json"
"""Written last into a made environment: a folder without it is none."""


@dataclass(frozen=True)
class Given:
    """An interpreter that the user pointed to, as kept on disk."""

    python: str


@dataclass(frozen=True)
class Made:
    """What a made environment was made of: a digest of its requirements, and what was installed."""

    requirements: str
    packages: Mapping[str, str]


@dataclass(frozen=True)
class Interpreter:
    """A Python and where it comes from.

    `label` goes into records: None for memladder's own, `given`, or `made from <digest of the
    requirements>`.
    """

    python: Path
    label: str | None

    def environ(self) -> dict[str, str]:
        """This process's variables, as a process of this interpreter shall have them.

        Another interpreter gets memladder and nothing else of ours to import.
        """
        if self.label is None:
            return dict(os.environ)
        ours = {"PYTHONPATH", "PYTHONHOME"}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        return kept | {"PYTHONPATH": str(source_folder())}


OWN = Interpreter(Path(sys.executable), None)


def chosen(framework: str) -> Interpreter:
    """The Python of a framework: the variable's, the given one, the made one, or our own."""
    name = family(framework)
    told = os.environ.get(variable(name))
    if told:
        return Interpreter(located(told), "given")
    python = given(name)
    if python is not None:
        return Interpreter(python, "given")
    found = made(name)
    if found is not None:
        return Interpreter(python_of(name), f"made from {found.requirements}")
    return OWN


def located(text: str) -> Path:
    """An interpreter as typed: a path, or a name on the PATH.

    Links stay: through them a virtual environment's Python knows where it is.
    """
    return Path(shutil.which(text) or text).absolute()


def family(framework: str) -> str:
    """The name of a framework's environment: its key's first word, so that variants share one.

    >>> family("vllm_fp16_int4")
    'vllm'
    """
    return framework.partition("_")[0]


def variable(name: str) -> str:
    """The variable that points to an environment's interpreter.

    >>> variable("vllm")
    'MEMLADDER_PYTHON_VLLM'
    """
    return f"MEMLADDER_PYTHON_{name.upper()}"


def root() -> Path:
    """The folder of all environments."""
    return default_dir().absolute() / "environments"


def python_of(name: str) -> Path:
    """The interpreter of a made environment."""
    return root() / name / "bin" / "python"


def given_file(name: str) -> Path:
    """Where it is kept which interpreter was given."""
    return root() / f"{name}.json"


def given(name: str) -> Path | None:
    """The interpreter that `memladder env use` was told, if any. Raises UsageError, also for a file
    that another user could have written."""
    found = _read(Given, given_file(name))
    return Path(found.python) if found else None


def made(name: str) -> Made | None:
    """What an environment that `memladder env create` made is of; None if there is none.

    Raises UsageError, also for one that another user could have written.
    """
    found = _read(Made, root() / name / MADE_FILE)
    if found is not None:
        require_own(python_of(name), default_dir().absolute())
    return found


def _read(kind: type[serial.T], path: Path) -> serial.T | None:
    try:
        require_own(path, default_dir().absolute())
        return serial.from_json(kind, serial.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read ({error}); remove it") from None


def source_folder() -> Path:
    """A folder with memladder and nothing else in it, for another interpreter's PYTHONPATH.

    The folder that memladder lies in may be a `site-packages`, whose packages would shadow those of
    the environment. Raises UsageError where the cache can't be written.
    """
    package = Path(__file__).absolute().parents[1]
    digest = hashlib.sha256(os.fsencode(package)).hexdigest()[:12]
    folder = default_dir().absolute() / "source" / digest
    link = folder / package.name
    if not link.is_symlink() or link.readlink() != package:
        part = writable_folder(folder) / f".{os.getpid()}.part"
        part.symlink_to(package)
        part.replace(link)
    require_own(link, default_dir().absolute())
    return folder
