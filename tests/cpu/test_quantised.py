"""The rows of other packages' formats: their bytes in closed form, and their outputs on a CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memladder import frameworks, models
from memladder.core.case import Case, Workload
from memladder.formats.int4 import Int4
from memladder.frameworks import gemlite_fp16_int4, torchao_fp8_fp8
from memladder.frameworks._shared.base import Availability, Job
from memladder.frameworks._shared.torch_quantised import group_size
from memladder.frameworks.bitsandbytes_fp16_nf4 import BitsAndBytesNf4
from memladder.meter.inside import worker
from memladder.meter.outside import runner
from memladder.models import LayerConfig, gguf_export

FAKES = Path(__file__).parents[1] / "fake_frameworks"
KEYS = (
    "torchao_fp16_int4",
    "torchao_fp8_fp8",
    "bitsandbytes_fp16_nf4",
    "gemlite_fp16_int4",
    "llamacpp_int4",
)


def job(
    model: str,
    key: str,
    folder: Path = Path(),
    *,
    shape: Workload = Workload(1, 1),
    narrow: bool = False,
) -> Job:
    config = models.narrow_config(model) if narrow else models.layer_config(model)
    return Job(Case(model, key, shape, "cpu"), config, folder)


def has_avx512_bf16() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


# Bits of a weight as each format's own description has them: torchao two bfloat16 a group of 128;
# float8 a float32 a row, of 8192 at least; QLoRA (arXiv:2305.14314, section 3) 0.127 bits of
# constants, which a CPU with avx512_bf16 holds as a bfloat16 a block of 64; gemlite one fp16 a
# group of 128; ggml's Q4_0 18 bytes for 32 elements.
@pytest.mark.parametrize(
    ("key", "bits"),
    [
        ("torchao_fp16_int4", 4 + 32 / 128),
        ("torchao_fp8_fp8", 8.002),
        (
            "bitsandbytes_fp16_nf4",
            4 + 16 / 64 if has_avx512_bf16() else 4 + 8 / 64 + 32 / (64 * 256),
        ),
        ("gemlite_fp16_int4", 4 + 16 / 128),
        ("llamacpp_int4", 18 * 8 / 32),
    ],
)
@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_weights_take_the_bits_of_their_format(key: str, bits: float, model: str) -> None:
    asked = job(model, key)
    # Norms and biases are below 0.01 % of the figure's layers.
    expected = models.parameters(asked.config) * bits / 8
    assert frameworks.get(key).weight_bytes(asked) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("key", KEYS)
def test_a_package_that_is_missing_is_a_reason(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    package = frameworks.get(key).packages[0].replace("llama-cpp-python", "llama_cpp")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    found = frameworks.get(key).availability("cpu")
    assert not found.available
    assert found.reason is not None
    # llama.cpp needs another package beside it, which may be missing as well.
    assert found.reason.startswith(package)
    assert found.reason.endswith("not installed")
    assert found.install is not None
    assert found.install.startswith("pip install 'memladder[")


def test_float8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = torchao_fp8_fp8.Quantised
    monkeypatch.setattr(parent, "availability", lambda *_: Availability(True, "0.18"))
    row = frameworks.get("torchao_fp8_fp8")
    assert row.availability("cpu").reason == "torchao has no float8 kernels for CPUs"
    for capability, available in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torchao_fp8_fp8, "compute_capability", lambda _, c=capability: c)
        assert row.availability("cuda:0").available == available


def test_groups_divide_every_row() -> None:
    assert group_size(models.layer_config("llama")) == 128
    assert group_size(models.layer_config("bloom")) == 128
    # 704 = 11 · 64
    assert group_size(models.narrow_config("llama")) == 64


class _PassesOver(BitsAndBytesNf4):
    """A package that quantises nothing, and says nothing of it."""

    package = "torch"

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        return linear

    def held(self, module: nn.Module) -> Mapping[str, int]:
        return {"weights": module.get_parameter("weight").nbytes}


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_matrices_that_a_package_passes_over_are_no_row(model: str, tmp_path: Path) -> None:
    asked = job(model, "bitsandbytes_fp16_nf4", tmp_path, narrow=True)
    row = _PassesOver()
    row.prepare(asked)
    session = row.session(asked, lambda _: None)
    session.context()
    session.weights()
    with pytest.raises(worker.WrongFormatError, match="they are in another format"):
        worker._held_weights(row, asked, session.categories())


@pytest.mark.parametrize("model", ["bloom", pytest.param("llama", marks=pytest.mark.slow)])
def test_what_changes_on_first_use_is_used_before_it_is_compiled(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{known}" if known else str(FAKES))
    import changing

    found = runner.verify(
        "changing",
        changing.FRAMEWORK,
        "cpu",
        cache_dir=tmp_path,
        limits=runner.Limits(300.0),
        log_path=tmp_path / "log",
        module="changing",
        model_names=[model],
        shapes=[Workload(2, 5)],
    )
    assert found.agrees, found
    # Beside the layer in float32, weights are rounded to the dtype only.
    assert all(check.sqnr_db is not None and check.sqnr_db > 40 for check in found.checks)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(64, 128), (96, 64), (40, 192), (32, 320), (33, 64), (32, 100), (3, 66), (64, 32)],
)
def test_bitsandbytes_matrices_of_any_size_are_held_as_told(rows: int, columns: int) -> None:
    row = BitsAndBytesNf4()
    asked = job("llama", "bitsandbytes_fp16_nf4", narrow=True)
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(rows))
    linear.requires_grad_(False)
    before = row.dequantised(row.quantise(linear, asked.config))
    module = row.used(linear, asked.config)
    assert row.held(module)["weights"] == row.matrix_bytes(rows, columns, asked)
    # bfloat16's unit roundoff is 2^-8: the scales take one, and `before`, in bfloat16, another.
    matrix = row.dequantised(module)
    assert matrix.shape == (rows, columns)
    assert torch.allclose(matrix, before, rtol=2**-7, atol=0)
    token = torch.randn(3, columns, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = module(token).float()
    assert torch.allclose(found, token.float() @ matrix.t(), rtol=2e-2, atol=2e-2 * columns**0.5)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_bitsandbytes_tiles_are_read_as_they_are_packed() -> None:
    """By bitsandbytes' own packing, which is plain torch and runs on every CPU."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    row = BitsAndBytesNf4()
    config = models.narrow_config("llama")
    linear = nn.Linear(192, 96, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module = row.quantise(linear, config)
    before = row.dequantised(module)
    weight = module.get_parameter("weight")
    state = weight.quant_state  # type: ignore[attr-defined]
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, state)
    assert row.held(module)["weights"] == 96 * 192 * 17 // 32
    scales = before.view(96, 3, 64).abs().amax(-1, keepdim=True)
    expected = before.view(96, 3, 64) / scales * scales.bfloat16()
    assert torch.allclose(row.dequantised(module), expected.view(96, 192), rtol=2**-8, atol=1e-6)


def _runs(key: str) -> pytest.MarkDecorator:
    missing = not frameworks.get(key).availability("cpu").available
    return pytest.mark.skipif(missing, reason=f"{key} can't run here")


@pytest.mark.parametrize(
    ("key", "model", "shape"),
    [
        pytest.param(
            "torchao_fp16_int4", "bloom", Workload(3, 5), marks=_runs("torchao_fp16_int4")
        ),
        pytest.param(
            "bitsandbytes_fp16_nf4", "llama", Workload(3, 5), marks=_runs("bitsandbytes_fp16_nf4")
        ),
        *(
            pytest.param("llamacpp_int4", model, Workload(3, 300), marks=_runs("llamacpp_int4"))
            for model in ("llama", "bloom")
        ),
    ],
)
def test_a_narrow_layer_agrees_with_the_reference(
    key: str, model: str, shape: Workload, tmp_path: Path
) -> None:
    found = runner.verify(
        key,
        frameworks.get(key),
        "cpu",
        cache_dir=tmp_path,
        limits=runner.Limits(300.0),
        log_path=tmp_path / "log",
        model_names=[model],
        shapes=[shape],
    )
    assert found.checks
    for check in found.checks:
        assert check.agrees, check
        # Four bits in groups of at most 128 lose 18 to 22 dB of a normal weight.
        assert check.sqnr_db is not None
        assert 17 < check.sqnr_db < 24


def test_rows_of_q_stand_as_llamacpp_turns_them() -> None:
    config = models.narrow_config("llama")
    size = config.values["head_dim"]
    order = gguf_export._order(config, "self_attn.q_proj")
    assert order is not None
    # Neighbours are turned there, halves here.
    assert order[:6].tolist() == [0, size // 2, 1, size // 2 + 1, 2, size // 2 + 2]
    assert sorted(order) == list(range(4 * size))
    fused = gguf_export._order(models.narrow_config("bloom"), "self_attention.query_key_value")
    assert fused is not None
    # The second head's q follows the first's; in Hugging Face's matrix k and v stand between.
    assert fused[[0, 63, 64, 384]].tolist() == [0, 63, 192, 64]


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_the_gguf_file_holds_the_layer_in_q4_0(model: str, tmp_path: Path) -> None:
    from gguf import GGUFReader

    config = models.narrow_config(model)
    reader = GGUFReader(gguf_export.ensure(config, tmp_path, 0))
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    block = sum(size for name, size in sizes.items() if name.startswith("blk.0."))
    assert block == gguf_export.layer_bytes(config)
    assert sum(sizes.values()) - block == gguf_export.other_bytes(config)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2}
    assert kinds == {"F16", "Q4_0"}
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    assert np.all(norm.data == 1)


def test_gemlites_words_are_unpacked_as_they_are_packed() -> None:
    """gemlite's packing: column 8 w + j of a row is nibble j of word w, words [in / 8, out]."""
    row = gemlite_fp16_int4.FRAMEWORK
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    matrix = Int4(group_size=128).quantise(values)
    nibbles = matrix.codes.long().view(6, 32, 8) << torch.arange(0, 32, 4)
    words = nibbles.sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    module = nn.Module()
    assert matrix.scales is not None
    for name, tensor in (("W_q", words.t()), ("scales", matrix.scales.t())):
        parameter = nn.Parameter(tensor.contiguous(), requires_grad=False)
        module.register_parameter(name, parameter)
    assert torch.equal(row.dequantised(module), Int4(group_size=128).dequantise(matrix))
    assert row.held(module) == {"weights": 6 * 128 + 6 * 2 * 2, "tables": 0}
