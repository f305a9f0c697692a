"""What the command line measures: names, paths, layers and scopes, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memladder import models
from memladder.core.case import Workload
from memladder.core.errors import ConfigError, UsageError
from memladder.sweeps import subjects

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**QWEN, **values}))
    return folder


def test_names_are_ours_and_paths_any_familys(tmp_path: Path, cache_dir: Path) -> None:
    path = config(tmp_path / "Qwen3-Tiny")
    found = subjects.subjects(("llama", str(path)), cache_dir)
    assert list(found) == ["llama", "qwen3_tiny"]
    assert found["llama"] == models.Subject(models.layer_config("llama"))
    assert found["qwen3_tiny"].config.model == "qwen3"
    whole = subjects.subjects((str(path),), cache_dir, layers="all")["qwen3_tiny"]
    assert whole.model is not None
    assert whole.model.layer_count == 3


def test_what_is_left_out_is_told(tmp_path: Path, cache_dir: Path) -> None:
    path = config(tmp_path / "awq", quantization_config={"quant_method": "awq"})
    (one,) = subjects.subjects((str(path),), cache_dir).values()
    assert one.note == "the checkpoint is quantised (awq); measured as if it were not"
    llama = tmp_path / "llama.json"
    values = {**models.definition("llama").VALUES, "quantization_config": {"bits": 4}}
    llama.write_text(json.dumps(values))
    (one,) = subjects.subjects(("llama",), cache_dir, config=llama).values()
    assert "quantised (None)" in str(one.note)


def test_a_past_beyond_the_positions_is_told(tmp_path: Path, cache_dir: Path) -> None:
    (one,) = subjects.subjects((str(config(tmp_path / "q")),), cache_dir, layers="all").values()
    assert subjects.too_long(one, [Workload(1, 1, 63)]) is None
    said = subjects.too_long(one, [Workload(1, 1, 64), Workload(1, 1)])
    assert said == "65 tokens are beyond max_position_embeddings, 64"


def test_options_that_make_no_sense_are_one_line(tmp_path: Path, cache_dir: Path) -> None:
    path = str(config(tmp_path / "q"))
    with pytest.raises(UsageError, match="q has 3 layers, not 4"):
        subjects.subjects((path,), cache_dir, layers=4)
    with pytest.raises(ConfigError, match="layers 0 … 2, not 3"):
        subjects.subjects((path,), cache_dir, layer=3)
    with pytest.raises(UsageError, match="give one of the two"):
        subjects.subjects((path,), cache_dir, layer=0, layers=2)
    with pytest.raises(UsageError, match="unknown model 'gpt'"):
        subjects.subjects(("gpt",), cache_dir)
    with pytest.raises(UsageError, match="two models are called q"):
        subjects.subjects((path, f"{path}/config.json"), cache_dir)
    for text in ("0", "-1", "some", "1.5", "4097"):
        with pytest.raises(UsageError, match="is not all or a whole number from 1 to 4096"):
            subjects.parse_scope(text)
    assert (subjects.parse_scope("all"), subjects.parse_scope(" 4 ")) == ("all", 4)
