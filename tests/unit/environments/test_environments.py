"""Whose Python runs a framework: chosen, given, made, removed; the installer is a script."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from memladder import frameworks
from memladder.core.errors import LockedError, UsageError
from memladder.environments import ask, install, interpreter

FAILS = """#!/bin/sh
if [ "$1" = venv ]; then mkdir -p "$4/bin"; echo half > "$4/half"; exit 0; fi
echo "  × No solution found: there is no onnxruntime==1.32.0"; exit 1
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("MEMLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEMLADDER_PYTHON_ONNXRUNTIME", raising=False)
    # Whatever this machine's installers are configured for.
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    ask.ask.cache_clear()
    return tmp_path / "cache"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def works(root: Path) -> str:
    """A `uv` that makes an environment of the Python that runs this test."""
    make = f'exec "{sys.executable}" -m venv --without-pip "$4"'
    return f'#!/bin/sh\nif [ "$1" = venv ]; then {make}; fi\necho "$@" > "{root}/asked"\n'


def test_without_anything_memladder_runs_it_itself() -> None:
    assert interpreter.chosen("pytorch") == interpreter.OWN
    assert interpreter.OWN.python == Path(sys.executable)


def test_variants_share_an_environment() -> None:
    assert {interpreter.family(key) for key in frameworks.names() if "ladder" in key} == {"ladder"}


def test_the_variable_comes_first_and_then_what_was_told_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin" / "uv", works(tmp_path)).parent), ":")
    install.use("onnxruntime", sys.executable)
    made = install.create("onnxruntime", "cpu", None, lambda _: None)
    digest = install.digest(install.requirements("onnxruntime", "cpu"))
    assert interpreter.chosen("onnxruntime") == interpreter.Interpreter(made, f"made from {digest}")
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:4] == ["pip", "install", "--python", str(made)]
    assert asked[4:] == ["--compile-bytecode", "-r", asked[-1]]
    assert "onnxruntime==" in Path(asked[-1]).read_text()

    install.use("onnxruntime", sys.executable)
    given = interpreter.Interpreter(Path(sys.executable), "given")
    assert interpreter.chosen("onnxruntime") == given
    monkeypatch.setenv("MEMLADDER_PYTHON_ONNXRUNTIME", str(made))
    assert interpreter.chosen("onnxruntime") == interpreter.Interpreter(made, "given")


def made_by_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path | None = None
) -> list[str]:
    """What a `uv` on the PATH was asked beside the interpreter and the requirements."""
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin" / "uv", works(tmp_path)).parent), ":")
    install.create("onnxruntime", "cpu", base, lambda _: None)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:3] == ["pip", "install", "--python"]
    assert asked[-3:-1] == ["--compile-bytecode", "-r"]
    return asked[4:-3]


def test_uv_takes_packages_from_where_pip_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.example/simple\nfind-links = /old\nno-index = false\n"
        "[install]\nfind-links =\n  /one\n  /two\ntrusted-host = a.example\n"
        "[download]\nno-index = true\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://b.example/simple")
    asked = made_by_uv(tmp_path, monkeypatch)

    # pip reads this machine's own files too, which may name other things.
    def told(option: str) -> list[str]:
        return [value for name, value in pairwise(asked) if name == option]

    assert told("--index-url") == ["https://b.example/simple"]
    assert told("--find-links") == ["/one", "/two"]
    assert told("--trusted-host") == ["a.example"]
    assert "--no-index" not in asked


def test_uv_looks_in_all_indexes_and_in_no_index_as_pip_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example https://b.example")
    monkeypatch.setenv("PIP_CONSTRAINT", "/pins.txt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert made_by_uv(tmp_path, monkeypatch) == [
        *("--extra-index-url", "https://a.example", "--extra-index-url", "https://b.example"),
        *("--constraint", "/pins.txt", "--no-index", "--index-strategy", "unsafe-best-match"),
    ]


def test_uv_that_is_configured_itself_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://a.example/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://b.example/simple")
    assert made_by_uv(tmp_path, monkeypatch) == []


def test_a_python_without_pip_tells_uv_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://a.example/simple")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "base"], check=True)
    assert made_by_uv(tmp_path, monkeypatch, tmp_path / "base" / "bin" / "python") == []


def test_a_configuration_that_pip_can_not_read_is_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.conf").write_text("index-url = https://a.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(
        UsageError, match=r"pip config list exits with status 2: .*no section headers"
    ):
        made_by_uv(tmp_path, monkeypatch)
    assert not (cache / "environments" / "onnxruntime").exists()


def test_uv_is_found_beside_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = script(tmp_path / "own" / "uv", works(tmp_path))
    (tmp_path / "own" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(beside.with_name("python")))
    install.create("onnxruntime", "cpu", None, lambda _: None)
    assert (tmp_path / "asked").exists()


def test_without_uv_it_is_venv_and_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A Python whose virtual environments have one whose pip says what it was asked.
    inner = f'[ "$2" = -c ] && exec "{sys.executable}" "$@"; echo "$@" > "{tmp_path}/asked"'
    outer = (
        f'#!/bin/sh\n[ "$2" = venv ] || exit 1\nmkdir -p "$3/bin"\n'
        f'cat > "$3/bin/python" <<\'END\'\n#!/bin/sh\n{inner}\nEND\nchmod +x "$3/bin/python"\n'
    )
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", outer)))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    install.create("onnxruntime", "cpu", None, lambda _: None)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[1:3] == ["pip", "install"]
    assert "onnxruntime==" in Path(asked[-1]).read_text()


def test_what_is_there_is_not_made_twice_and_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin" / "uv", works(tmp_path)).parent), ":")
    made = install.create("onnxruntime", "cpu", None, lambda _: None)
    with pytest.raises(UsageError, match="is there already; to make it anew: memladder env remove"):
        install.create("onnxruntime", "cpu", None, lambda _: None)
    install.use("onnxruntime", sys.executable)
    assert len(install.remove("onnxruntime")) == 2
    assert not made.exists()
    assert Path(sys.executable).exists()
    assert interpreter.chosen("onnxruntime") == interpreter.OWN
    with pytest.raises(UsageError, match="onnxruntime has no environment of its own"):
        install.remove("onnxruntime")


def test_a_failed_creation_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = script(tmp_path / "bin" / "uv", FAILS).parent
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    reason = "uv exits with status 1: No solution found: there is no onnxruntime==1.32.0"
    with pytest.raises(UsageError, match=reason):
        install.create("onnxruntime", "cpu", None, lambda _: None)
    assert not (cache / "environments" / "onnxruntime").exists()
    assert interpreter.chosen("onnxruntime") == interpreter.OWN


def test_an_interrupted_creation_leaves_nothing_and_nobody(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = FAILS.replace("exit 1", "sleep 600")
    monkeypatch.setenv("PATH", f"{script(tmp_path / 'bin' / 'uv', waits).parent}:/usr/bin:/bin")

    def interrupt(line: str) -> None:
        assert (cache / "environments" / "onnxruntime" / "half").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install.create("onnxruntime", "cpu", None, interrupt)
    assert not (cache / "environments" / "onnxruntime").exists()


def test_what_a_killed_creation_left_is_no_environment(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "environments" / "onnxruntime" / "bin").mkdir(parents=True)
    assert interpreter.chosen("onnxruntime") == interpreter.OWN
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin" / "uv", works(tmp_path)).parent), ":")
    assert install.create("onnxruntime", "cpu", None, lambda _: None).exists()


def test_two_can_not_make_the_same(cache: Path) -> None:
    with (
        install._locked("onnxruntime"),
        pytest.raises(LockedError, match="works on the environment onnxruntime"),
    ):
        install.create("onnxruntime", "cpu", None, lambda _: None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is not an interpreter"),
        ("#!/bin/sh\necho hello", "can't run workers"),
        ("#!/bin/sh\necho the reason >&2; exit 1", "can't run workers: the reason"),
    ],
)
def test_what_is_no_interpreter_is_not_taken(
    cache: Path, tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "python"
    if content is not None:
        script(path, content)
    with pytest.raises(UsageError, match=reason):
        install.use("onnxruntime", str(path))
    assert not (cache / "environments" / "onnxruntime.json").exists()


def test_an_old_python_is_refused_in_words() -> None:
    from memladder.environments import probe

    program = (
        "import sys; sys.version_info = (3, 9, 18, 'final', 0); sys.argv = ['x'];"
        f"exec(open({probe.__file__!r}).read())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "workers need 3.10" in done.stderr


def test_a_broken_note_is_one_line(cache: Path) -> None:
    (cache / "environments").mkdir(parents=True)
    (cache / "environments" / "onnxruntime.json").write_text(json.dumps({"python": 3}))
    with pytest.raises(UsageError, match=r"onnxruntime.json can't be read .*; remove it"):
        interpreter.chosen("onnxruntime")


def test_comments_do_not_change_what_is_pinned(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("# packages: 3\na==1  # why\n\nb==2\n")
    two.write_text("a==1\nb==2\n")
    assert install.digest(one) == install.digest(two)
    two.write_text("a==1\nb==3\n")
    assert install.digest(one) != install.digest(two)


@pytest.mark.parametrize("name", install.names())
def test_requirements_pin_exact_versions_and_name_no_source(name: str) -> None:
    folder = Path(frameworks.__file__).with_name("requirements")
    for path in folder.glob(f"{name}*.txt"):
        for line in filter(None, path.read_text().splitlines()):
            assert line.startswith("#") or "==" in line, f"{path.name}: {line}"
            assert "://" not in line
            assert not line.startswith("-")


@pytest.mark.parametrize("what", ["file", "folder", "cache"])
def test_an_environment_that_others_could_have_planted_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    planted = script(tmp_path / "python", f"#!/bin/sh\ntouch {tmp_path}/RAN\n")
    file = interpreter.given_file("onnxruntime")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"python": str(planted)}))
    one = {"file": file, "folder": file.parent, "cache": cache}[what]
    one.chmod(0o777)
    with pytest.raises(UsageError, match=f"{one} can be written by other users"):
        interpreter.chosen("onnxruntime")
    with pytest.raises(UsageError, match="can be written by other users"):
        ask.availability("onnxruntime", frameworks.get("onnxruntime"), "cpu")
    assert not (tmp_path / "RAN").exists()
    one.chmod(0o755 if one.is_dir() else 0o644)
    assert interpreter.chosen("onnxruntime").python == planted


def test_no_environment_is_made_where_others_can_write(cache: Path) -> None:
    (cache / "environments").mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(UsageError, match=f"{cache} can be written by other users"):
        install.create("onnxruntime", "cpu", None, lambda _: None)


def test_uv_reads_no_configuration_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv.toml may name any index; uv itself is asked what it would say to a broken one."""
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv is None:
        pytest.skip("uv is not here")
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "uv.toml").write_text("[pip]\nindex-url = 12\n")
    monkeypatch.chdir(hostile)
    said: list[str] = []
    command = [uv, "pip", "list", "--python", sys.executable]
    assert subprocess.run(command, capture_output=True).returncode != 0
    interpreter.root().mkdir(parents=True)
    install._run("uv", command, said.append)
    assert said
