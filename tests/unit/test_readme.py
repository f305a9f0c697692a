"""The README's table is what the records in `results/` say, to the MiB."""

from pathlib import Path

import pytest

from memladder.case import FIGURE_MODELS, FIGURE_SHAPES, Case
from memladder.measure.record import Status
from memladder.sweep import store
from memladder.units import mib

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("file", "device"), [("h100.json", "cuda:0"), ("cpu.json", "cpu")])
@pytest.mark.parametrize(
    ("framework", "name"), [("pytorch", "PyTorch-Inductor"), ("onnxruntime", "ONNX Runtime")]
)
def test_the_table_is_what_was_measured(file: str, device: str, framework: str, name: str) -> None:
    records = {record.case: record for record in store.read(ROOT / "results" / file).records}
    expected = []
    for model in FIGURE_MODELS:
        for shape in FIGURE_SHAPES:
            record = records[Case(model, framework, shape, device)]
            if record.steady_bytes is None:
                assert record.status is Status.OOM
                expected.append("out of memory")
            else:
                expected.append(str(round(mib(record.steady_bytes))))
    row = f"| {name}, {'CPU' if device == 'cpu' else 'H100'}"
    (line,) = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith(row)]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == expected
