"""Compiled programs: their steps, formats, budgets, files, tiles."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from memladder import formats, models
from memladder.core.case import Workload
from memladder.core.errors import FormatError, GraphError, UsageError
from memladder.core.units import MIB
from memladder.engine.compile import arena, bundle, schedule, tiles
from memladder.engine.compile import layers as compiled_layers
from memladder.engine.compile.compile import CompileOptions, Result, compile_file, within
from memladder.engine.compile.traffic import Traffic, weight_sizes
from memladder.engine.graph.fused import Product
from memladder.engine.graph.nodes import Input, Linear, Norm, Pointwise
from memladder.engine.packed import packed_layer
from memladder.engine.program.steps import Step
from memladder.models import onnx_export
from tests import layers
from tests.unit.onnx_models import save

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")


def moved(found: Result) -> int:
    return Traffic(found.form, found.program).fused()


def exported(model: str, shape: str, cache_dir: Path) -> Path:
    return onnx_export.ensure(models.narrow_config(model), cache_dir, Workload.parse(shape), 0)


# By activation: what runs for one chunk of both layers, in order; LLaMA's and BLOOM's first norm
# and MLP differ by name only.
KERNELS = {
    None: "norm qkv attention matmul norm mlp matmul",
    "int8": "norm quantise qkv attention quantise matmul norm quantise mlp quantise matmul",
}


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("activation", KERNELS)
@pytest.mark.parametrize("shape", ["1x1", "32x1", "2x17"])
def test_the_steps_of_a_chunk(
    model: str, activation: str | None, shape: str, cache_dir: Path
) -> None:
    kind = None if activation is None else formats.get(activation)
    program = layers.form(layers.narrow(model), cache_dir).program(Workload.parse(shape), kind)
    norm, mlp = {"llama": ("rms_norm", "glu"), "bloom": ("layer_norm", "matmul")}[model]
    expected = KERNELS[activation].replace("norm", norm).replace("mlp", mlp).split()
    assert [step.kernel for step in program.steps] == expected
    # A fused layer keeps its positions at any shape: it is compiled for all.
    (positions,) = {
        name for step in program.steps for name in step.weights if name in ("frequencies", "slopes")
    }
    assert positions == {"llama": "frequencies", "bloom": "slopes"}[model]


@pytest.mark.parametrize(("model", "shape"), [("llama", "3x600"), ("bloom", "1x1025")])
def test_a_layer_compiled_once_is_that_compiled_at_the_shape(
    model: str, shape: str, cache_dir: Path
) -> None:
    found = compile_file(exported(model, shape, cache_dir), CompileOptions())
    form = layers.form(models.narrow_config(model), cache_dir)
    assert form.program(found.graph.shape) == found.program


@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_single_tokens_need_no_positions(model: str, cache_dir: Path) -> None:
    found = compile_file(exported(model, "1x1", cache_dir), CompileOptions()).program
    assert len(found.steps) == 7
    positions = {"frequencies", "slopes"}
    assert not any(positions & step.weights.keys() for step in found.steps)


@pytest.mark.parametrize(("model", "shape"), [("llama", "3x600"), ("bloom", "1x1025")])
def test_the_packed_weights_are_the_checkpoints(
    model: str, shape: str, tmp_path: Path, cache_dir: Path
) -> None:
    config = models.narrow_config(model)
    found = compile_file(exported(model, shape, cache_dir), CompileOptions(format="int4"))
    bundle.pack(found, tmp_path / "weights")
    ours = packed_layer.load(tmp_path / "weights")
    theirs = packed_layer.load(
        compiled_layers.ensure_packed(config, formats.get("int4"), cache_dir, 0)
    )
    assert ours.matrices.keys() == theirs.matrices.keys()
    for name, matrix in theirs.matrices.items():
        assert torch.equal(ours.matrices[name].codes, matrix.codes)
        assert matrix.scales is not None
        assert torch.equal(ours.matrices[name].scales, matrix.scales)
    assert ours.vectors.keys() == theirs.vectors.keys()
    for name, vector in ours.vectors.items():
        torch.testing.assert_close(vector, theirs.vectors[name], rtol=1e-6, atol=0)
    # One was compiled for a shape, the other for all.
    with pytest.raises(UsageError, match=f"compiled for {shape}; 1x1 was asked for"):
        ours.form.program(Workload(1, 1))


def test_matrices_that_are_kept_in_fp16(cache_dir: Path) -> None:
    path = exported("llama", "1x1", cache_dir)
    found = compile_file(path, CompileOptions(format="int4", kept=("down", "*o_proj*")))
    kept = {name for name, kind in found.form.others.items() if str(kind) == "fp16"}
    assert kept == {"down", "output"}
    assert str(found.form.format_of("up")) == "int4"
    with pytest.raises(UsageError, match=r"no matrix is called 'dwon'; there are: query \(block"):
        compile_file(path, CompileOptions(format="int4", kept=("dwon",)))


def test_activations_of_kept_matrices_are_not_quantised(cache_dir: Path) -> None:
    path = exported("llama", "1x1", cache_dir)
    found = compile_file(path, CompileOptions(format="int1", kept=("query", "gate", "down")))
    steps = [(step.kernel, step.values.get("format")) for step in found.program.steps]
    assert steps == [
        ("rms_norm", None),
        # Keys and values of int8, queries of fp16: no kernel has both.
        *(("quantise", "int8"), ("qkv", "int8"), ("qkv", None), ("attention", None)),
        *(("quantise", "int8"), ("matmul", "int8"), ("rms_norm", None)),
        # The gate apart from up.
        *(("matmul", None), ("quantise", "int8"), ("matmul", "int8"), ("pointwise", None)),
        ("matmul", None),
    ]


def test_a_memory_budget_is_kept_and_used(cache_dir: Path) -> None:
    path = exported("bloom", "1x1025", cache_dir)
    knee = compile_file(path, CompileOptions())
    assert knee.chunk == 512
    least = compile_file(path, CompileOptions(budget=knee.plan.nbytes))
    assert least.plan.nbytes <= knee.plan.nbytes
    assert moved(least) <= moved(knee)
    # More memory is used, for fewer reads of the weights; less is used where there is less.
    bytes_moved = []
    for budget in (knee.plan.nbytes * 9 // 10, knee.plan.nbytes, 2 * knee.plan.nbytes, 1 << 30):
        found = compile_file(path, CompileOptions(budget=budget))
        assert found.plan.nbytes <= budget
        bytes_moved.append(moved(found))
    assert bytes_moved == sorted(bytes_moved, reverse=True)
    assert len(set(bytes_moved)) > 2
    wide = compile_file(path, CompileOptions(budget=1 << 30))
    assert wide.chunk >= 1025
    assert len(wide.program.steps) == 7
    with pytest.raises(
        UsageError, match=r"a memory budget of 1,024 bytes is too small: [\d,]+ are the "
    ):
        compile_file(path, CompileOptions(budget=1024))


def test_compiling_twice_is_the_same(cache_dir: Path) -> None:
    path = exported("llama", "3x600", cache_dir)
    one, two = (compile_file(path, CompileOptions(format="int4")) for _ in range(2))
    assert (one.program, one.plan) == (two.program, two.plan)
    assert schedule.markdown(one, "m", "ladder") == schedule.markdown(two, "m", "ladder")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (CompileOptions("tvm"), "unknown engine 'tvm'; known: welder, ladder"),
        (CompileOptions("welder", "int4"), "welder fuses and has no number format but fp16"),
        (
            CompileOptions("welder", activation="fp8"),
            "welder fuses and has no number format but fp16",
        ),
        (
            CompileOptions("ladder", "int4", "int4"),
            "int4 is no activation format; allowed: fp16, fp8",
        ),
        (CompileOptions("ladder", "int5"), "int5"),
    ],
)
def test_options_that_can_not_be(options: CompileOptions, said: str, cache_dir: Path) -> None:
    with pytest.raises((UsageError, FormatError), match=said):
        compile_file(exported("llama", "1x1", cache_dir), options)


def test_nodes_without_a_kernel_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [("Erf", "x", "e"), ("Exp", "e", "y")])
    with pytest.raises(GraphError, match="no kernel for exp 'exp_1'"):
        compile_file(path, CompileOptions())


def test_a_product_never_writes_over_what_it_reads(tmp_path: Path) -> None:
    matrix = np.eye(8, dtype=np.float32)
    path = save(tmp_path / "m.onnx", [("MatMul", ("x", "w"), "y")], {"w": matrix})
    found = compile_file(path, CompileOptions())
    assert found.program.input != found.program.output


def test_programs_that_are_none(tmp_path: Path, cache_dir: Path) -> None:
    found = compile_file(exported("llama", "1x1", cache_dir), CompileOptions())
    program, weights = tmp_path / "program.json", tmp_path / "weights"
    bundle.pack(found, weights)
    text = bundle.program_json(found)
    raw = json.loads(text)
    for changed in ("", "[]", "{}", text[:-20], "[" * 100_000):
        program.write_text(changed)
        with pytest.raises(FormatError, match="not a program of memladder"):
            bundle.load(program, weights)
    program.write_text(json.dumps({**raw, "memladder_program": 2}))
    with pytest.raises(FormatError, match="version 2, not 3; compile the layer again"):
        bundle.load(program, weights)
    for changed in (
        text.replace('"matmul"', '"__loader__"'), text.replace('"down"', '"elsewhere"'),
        json.dumps({**raw, "buffers": []}), json.dumps({**raw, "seq_len": 1 << 40}),
        json.dumps({**raw, "chunk": 0}), json.dumps({**raw, "activation": "fp7"}),
    ):  # fmt: skip
        program.write_text(changed)
        with pytest.raises(FormatError, match=r"not the program of .*weights; compile the layer"):
            bundle.load(program, weights)
    program.write_text(text)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FormatError, match="not as it was written: its SHA-256 differs"):
        bundle.load(program, weights)
    weights.with_name("weights.sha256").unlink()
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        bundle.load(program, weights)


def test_programs_that_were_changed(tmp_path: Path, cache_dir: Path) -> None:
    """A byte here or there, lines dropped or swapped, numbers and words that are others."""
    found = compile_file(exported("llama", "1x1", cache_dir), CompileOptions())
    program, weights = tmp_path / "program.json", tmp_path / "weights"
    bundle.pack(found, weights)
    text = bundle.program_json(found)
    program.write_text(text)
    assert bundle.load(program, weights).program == found.program
    pick = random.Random(0)
    words = sorted(set(re.findall(r'"\w+"|-?\d+', text)))
    for _ in range(350):
        lines = text.splitlines(keepends=True)
        one, other = pick.sample(range(len(lines)), 2)
        kind = pick.randrange(4)
        if kind == 0:
            del lines[one]
        elif kind == 1:
            lines[one], lines[other] = lines[other], lines[one]
        elif kind == 2:
            word = pick.choice([*words, "-1", "null", "1e400", "[]", str(1 << 70)])
            lines[one] = re.sub(r'"?[\w.-]+"?(?=,?\n)', lambda _, w=word: w, lines[one])
        else:
            place = pick.randrange(len(lines[one]))
            lines[one] = lines[one][:place] + chr(pick.randrange(256)) + lines[one][place + 1 :]
        changed = "".join(lines)
        if changed == text:
            continue
        program.write_text(changed)
        with pytest.raises(FormatError) as caught:
            bundle.load(program, weights)
        assert "\n" not in str(caught.value)


X = Input(256, "x")


def test_tiles_follow_the_index_maps() -> None:
    norm = Norm(256, "", X, "rms", 256, 1e-5)
    product = Product(512, "", norm, "up")
    added = Pointwise(512, "", "add", (product, Product(512, "", X, "gate")))
    # 256 columns of 128 rows are 64 KiB, which fit; 8192 do not.
    assert tiles.needed(product, (128, 64)) == [(128, 256)]
    assert tiles.needed(added, (128, 64)) == [(128, 64), (128, 64)]
    assert tiles.needed(norm, (1, 1)) == [(1, 256)]
    assert tiles.connection(product, added, (128, 64)) == "register"
    assert tiles.connection(norm, product, (128, 64)) == "shared"
    wide = Norm(8192, "", Input(8192, "x"), "rms", 8192, 1e-5)
    assert tiles.connection(wide, Product(512, "", wide, "up"), (128, 64)) == "global"


def test_how_often_a_product_reads_its_activation() -> None:
    one = tiles.cut(1, 28672, 8192, 2 * 28672 * 8192)
    assert (one.rows, one.reads) == (16, 1)
    many = tiles.cut(4096, 8192, 8192, 2 * 8192 * 8192)
    # 32 by 32 tiles are 8 waves of 132; 4 by 224 are 7.
    assert (many.rows, many.columns, many.reads) == (128, 256, 8)
    # The weight once for each row of tiles, the activation once for each column.
    assert many.cache_bytes == 2 * (32 * 8192 * 8192 + 32 * 4096 * 8192)
    assert tiles.cut(512, 57344, 8192, 2 * 57344 * 8192).reads == 7
    # Weights and activation fit.
    assert tiles.cut(512, 4096, 1024, 2 * 4096 * 1024).reads == 1


def test_of_all_chunks_that_fit_the_one_that_moves_least_is_taken(cache_dir: Path) -> None:
    form = layers.form(models.layer_config("llama"), cache_dir)
    wide = 1 << 30
    _, _, chunk = within(form, Workload(1, 4096), None, wide, in_place=True)
    found = {}
    for size in (512, 1024, 1408, 2048, 4096):
        program = form.program(Workload(1, 4096), chunk=size, budget=wide)
        found[size] = Traffic(form, program).fused()
    assert min(found, key=lambda size: found[size]) == chunk == 2048


def test_traffic_is_counted_by_hand(cache_dir: Path) -> None:
    found = compile_file(exported("llama", "1x1", cache_dir), CompileOptions())
    sizes = weight_sizes(found.form)
    values = models.narrow_config("llama").values
    assert sum(sizes.values()) == 2 * models.parameters(models.narrow_config("llama"))
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    kv = values["num_key_value_heads"] * values["head_dim"]
    # norm, qkv, attention, output with its residual, norm, gate and up, down with its residual.
    columns = (2 + 2 + 2 + 3 + 2 + 1 + 2) * hidden + 2 * inner + 4 * kv
    assert moved(found) == sum(sizes.values()) + 2 * columns
    # One token, whose scores are a number a head. Norms, seven products, attention, silu and its
    # product with up, two residuals: what each of them reads and writes.
    apart = (2 + 2 + 1 + 1 + 2 + 2 + 3 + 2 + 1 + 1 + 1 + 3) * hidden
    apart += (1 + 2 + 1 + 3 + 1) * inner + (1 + 1 + 2) * kv + 4 * values["num_attention_heads"]
    unfused = Traffic(found.form, found.program).unfused(found.graph)
    assert unfused == sum(sizes.values()) + 2 * apart


# MiB that Nsight Compute counted on an H100, read and written: docs/evidence/traffic-h100.md. By
# model, weights, first matrix of the step, and its rows.
COUNTED = {
    ("llama", "fp16", "query", 512): 144.0,
    ("llama", "fp16", "output", 512): 144.1,
    ("llama", "fp16", "gate", 512): 976.8,
    ("llama", "fp16", "down", 512): 484.0,
    ("llama", "int4", "gate", 512): 309.5,
    ("llama", "int4", "down", 512): 151.5,
    ("bloom", "fp16", "key", 1024): 1050.7,
    ("bloom", "fp16", "query", 512): 428.4,
    ("bloom", "fp16", "output", 512): 442.4,
    ("bloom", "fp16", "up", 1408): 2453.4,
    ("bloom", "fp16", "down", 1408): 2411.6,
    ("bloom", "fp16", "up", 1280): 2387.7,
    ("bloom", "fp16", "down", 1280): 2453.3,
    ("bloom", "int4", "key", 1024): 475.7,
    ("bloom", "int4", "query", 512): 137.4,
    ("bloom", "int4", "output", 512): 151.4,
    ("bloom", "int4", "up", 1408): 1439.8,
}


@pytest.mark.parametrize(
    ("model", "weight"), [(m, w) for m in ("llama", "bloom") for w in ("fp16", "int4")]
)
def test_traffic_is_what_was_counted(model: str, weight: str, cache_dir: Path) -> None:
    form = layers.form(models.layer_config(model), cache_dir, weight)
    program = form.program(Workload(1, 4096))
    traffic = Traffic(form, program)
    predicted = {}
    for step in program.steps:
        names = [name for name in step.weights.values() if name in form.fused.matrices]
        if names:
            predicted[model, weight, names[0], step.reads["x"].count] = traffic.of(step) / MIB
    counted = {key: mib for key, mib in COUNTED.items() if key[:2] == (model, weight)}
    assert {key: predicted[key] for key in counted} == pytest.approx(counted, rel=0.15)


def test_the_schedule_says_what_was_done(cache_dir: Path, tmp_path: Path) -> None:
    found = compile_file(exported("bloom", "1x1025", cache_dir), CompileOptions(format="int4"))
    text = schedule.markdown(found, "bloom.onnx", "ladder")
    assert "# bloom.onnx, compiled by ladder" in text
    assert "weights int4" in text
    assert "none is measured" in text
    assert f"{len(found.program.steps)} launches" in text
    arena.draw(found.program, found.plan, tmp_path / "arena.svg")
    drawn = (tmp_path / "arena.svg").read_text()
    assert all(buffer.partition(".")[0] in drawn for buffer in found.program.lifetimes())
    arena.draw(found.program, found.plan, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn


def test_steps_of_a_graph_without_attention(tmp_path: Path) -> None:
    matrix = np.eye(8, dtype=np.float32)
    nodes = [("MatMul", ("x", "w"), "m"), ("Relu", "m", "r"), ("Add", ("r", "x"), "y")]
    found = compile_file(save(tmp_path / "m.onnx", nodes, {"w": matrix}), CompileOptions())
    (step,) = found.program.steps
    assert isinstance(step, Step)
    assert (step.kernel, step.values) == ("matmul", {"activation": "relu"})
    assert step.reads.keys() == {"x", "residual"}
    assert isinstance(found.graph.output, Pointwise)
    assert isinstance(found.graph.output.operands[0], Pointwise)
    assert isinstance(found.graph.output.operands[0].operands[0], Linear)
