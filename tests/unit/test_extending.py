"""CONTRIBUTING's recipes, tried on a copy of the package: one file or entry each, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memladder

ROOT = Path(__file__).parents[2]

FORMAT = '''"""Ternary weights: -1, 0, 1 times a row's mean magnitude.

Source: Ma et al. 2024 (arXiv:2402.17764), section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memladder.formats._shared.base import Format, Quantised, half


@dataclass(frozen=True)
class Ternary(Format):
    """Codes 0, 1, 2."""

    bits = 2
    scale_dtype = torch.float16
    source = "arXiv:2402.17764, section 2"

    def quantise(self, values: Tensor) -> Quantised:
        scales = half(values.float().abs().mean(dim=1, keepdim=True))
        codes = torch.round(values / scales.float()).clamp_(-1, 1) + 1
        return Quantised(codes.to(torch.uint8), scales)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float().sub_(1)


FORMAT = Ternary
'''

FRAMEWORK = '''"""PyTorch without a compiler."""

from memladder.frameworks import pytorch


class _Session(pytorch.InductorSession):
    def compile(self):
        self._compiled = self._layer
        self.run()

    def settings(self):
        return {"backend": "eager"}


class Eager(pytorch.PyTorch):
    title = "PyTorch, eager"

    def session(self, job, announce):
        return _Session(job, announce)


FRAMEWORK = Eager()
'''

MODEL = '''"""Mistral-7B's layer: LLaMA's with other widths.

Source: Jiang et al. 2023 (arXiv:2310.06825)."""

from memladder.models.families import llama
from memladder.models.families.llama import outline, widths

TITLE = "MISTRAL"
VALUES = {
    **llama.VALUES,
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
NARROW = {**llama.NARROW, "model_type": "mistral"}
LAYER_PREFIXES = llama.LAYER_PREFIXES


def read(raw):
    return llama.read(raw) | {"model_type": "mistral", "sliding_window": None}
'''

# (file, where, what is put before it): `softsign` is x / (1 + |x|).
FUNCTION = [
    (
        "kernels/functions.py",
        '    "sigmoid": Function(',
        '    "softsign": Function(lambda x: x / (1 + np.abs(x)), has_kink=False),\n',
    ),
    (
        "kernels/naive/rows.py",
        '    "sigmoid": torch.sigmoid,',
        '    "softsign": functional.softsign,\n',
    ),
    (
        "kernels/cuda/pointwise.py",
        '    elif FUNCTION == "tanh":',
        '    elif FUNCTION == "softsign":\n        values = values / (1.0 + tl.abs(values))\n',
    ),
]

TRY_FORMAT = """
import json, sys, torch
from memladder import formats, frameworks
kind = formats.get("ternary")
matrix = torch.tensor([[0.9, -0.9, 0.1, -1.1]])
found = kind.quantise(matrix)
print(json.dumps({
    "codes": found.codes.tolist(), "values": kind.dequantise(found).tolist(),
    "rows": [name for name in frameworks.names() if "ternary" in name],
    "bits": kind.bits_per_weight(4096),
}))
"""

TRY_MODEL = """
import json
from memladder import models
config = models.layer_config("mistral")
print(json.dumps([models.names(), models.parameters(config), models.hidden_size(config)]))
"""

TRY_FUNCTION = """
import json, sys
from pathlib import Path
import numpy as np, torch
from memladder.kernels import cuda, naive
from memladder.kernels.functions import FUNCTIONS
from tests.unit.onnx_models import imported
nodes = [("Abs", "x", "a"), ("Add", ("a", "one"), "d"), ("Div", ("x", "d"), "y")]
graph = imported(Path(sys.argv[1]), nodes, {"one": np.float32(1)})
x = torch.linspace(-5, 5, 333).half().view(3, 111)
made = [torch.empty_like(x) for _ in range(2)]
for kernels, out in zip((naive, cuda), made):
    kernels.pointwise(x, out, function=graph.output.function)
wanted = torch.from_numpy(FUNCTIONS["softsign"](x.double().numpy()))
print(json.dumps([graph.output.function, len(graph.output.operands),
                  *(float((out.double() - wanted).abs().max()) for out in made)]))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with memladder's package in it, as a contributor has changed it."""
    folder = tmp_path_factory.mktemp("copied")
    package = folder / "memladder"
    own = Path(memladder.__file__).parent
    shutil.copytree(own, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "formats" / "ternary.py").write_text(FORMAT)
    (package / "frameworks" / "eager.py").write_text(FRAMEWORK)
    (package / "models" / "families" / "mistral.py").write_text(MODEL)
    for name, place, added in FUNCTION:
        text = (package / name).read_text()
        assert text.count(place) == 1
        (package / name).write_text(text.replace(place, added + place))
    return folder


def python(copied: Path, *arguments: str | Path) -> str:
    """Standard output of a Python that imports the copy."""
    path = f"{copied}{os.pathsep}{ROOT}"
    env = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_format_quantises_decodes_and_is_a_row(copied: Path) -> None:
    found = json.loads(python(copied, "-c", TRY_FORMAT))
    # The mean magnitude is 0.75: of it 0.9 and 1.1 are more than half, 0.1 is less.
    assert found["codes"] == [[2, 0, 1, 0]]
    assert found["values"] == [[0.75, -0.75, 0.0, -0.75]]
    assert found["rows"] == ["ladder_fp16_ternary"]
    assert found["bits"] == 2 + 16 / 4096


def test_a_framework_is_measured(copied: Path, tmp_path: Path) -> None:
    narrow = json.loads(python(copied, "-c", NARROW))
    (tmp_path / "config.json").write_text(json.dumps(narrow))
    options = [
        *("--model", "mistral", "--framework", "eager", "--seq_len", "8", "--device", "cpu"),
        *("--config", tmp_path / "config.json"),
        *("--output-dir", tmp_path, "--cache-dir", tmp_path / "cache"),
    ]
    python(copied, "-m", "memladder", "measure", *options)
    (path,) = tmp_path.glob("log/**/mistral_eager_1_8*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "measured"
    assert record["settings"]["backend"] == "eager"


NARROW = """
import json
from memladder.models.families import mistral
print(json.dumps(mistral.NARROW))
"""


def test_a_model_is_described(copied: Path) -> None:
    names, parameters, hidden = json.loads(python(copied, "-c", TRY_MODEL))
    assert "mistral" in names
    # Of the published 7,241,732,096, without embeddings, head (2 * 32000 * 4096) and last norm.
    assert parameters * 32 == 7_241_732_096 - 2 * 32000 * 4096 - 4096
    assert hidden == 4096


def test_a_function_is_recognised_run_and_matched(copied: Path, tmp_path: Path) -> None:
    name, operands, *errors = json.loads(python(copied, "-c", TRY_FUNCTION, tmp_path))
    assert (name, operands) == ("softsign", 1)
    # Half a step of float16 below 1.
    assert max(errors) <= 2**-12
