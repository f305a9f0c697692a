"""The public face: what it has, what importing it costs, and that commands are thin over it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import memladder
from memladder.core.errors import UsageError
from memladder.core.record import Status

ROOT = Path(__file__).parents[2]


def test_the_face_is_this() -> None:
    assert memladder.__all__ == [
        "diff",
        "explain",
        "fit",
        "load_layer",
        "load_model",
        "measure",
        "predict",
        "report",
        "sweep",
        "table",
    ]
    for name in memladder.__all__:
        found = getattr(memladder, name)
        assert callable(found), name
        assert found.__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = memladder.nothing


def test_importing_it_loads_nothing() -> None:
    code = (
        "import sys, memladder; "
        "print(*sorted(n for n in sys.modules if n.partition('.')[0] in "
        "('torch', 'numpy', 'matplotlib', 'rich', 'typer', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []


def test_a_published_row_is_beside_each_record() -> None:
    rows = {row.id: row for row in memladder.table(ROOT / "results/h100.json")}
    assert rows["llama_ladder_fp16_int4_1_1"].steady_mib == 682.0
    assert rows["llama_ladder_fp16_int4_1_1"].published_mib == 840


def test_a_record_explains_itself_and_is_shown(tmp_path: Path) -> None:
    # No such framework's package is here: the record says so, and costs no process.
    record = memladder.measure("llama", "vllm", device="cpu", log=tmp_path)
    assert record.status is Status.UNAVAILABLE
    assert (tmp_path / "llama_vllm_1_1.json").exists()
    assert repr(record).startswith("<Record llama_vllm_1_1 on cpu: unavailable, vLLM's package")
    assert "<script>" not in record._repr_html_()
    with pytest.raises(UsageError):
        memladder.measure("llama", "no_such_framework", device="cpu")


def test_one_record_is_explained_or_compared() -> None:
    with pytest.raises(UsageError, match=r"holds 9\d records; one is wanted"):
        memladder.explain(ROOT / "results/h100.json")
