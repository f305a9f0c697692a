"""A layer as an ONNX graph whose weights stay in the layer's safetensors file.

PyTorch's own exporter makes the graph. Two things are then as an ONNX user wants them: a linear
layer is one Gemm that reads the [out, in] matrix as it lies in the file (MatMul would need a
transposed copy of every weight, in the file or in memory), and rotary positions are one
RotaryEmbedding. RMSNormalization and Attention come from the exporter as single operators.

The graph refers to `weights.safetensors` beside it, so that all shapes of a layer share one file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.case import Shape
from memladder.models import LayerConfig, cache, hidden_size, weights

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
_RECIPE = "2"
_MAKERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
_PREFIX = "block."


def file_name(shape: Shape) -> str:
    """The graph's file for a shape; differs whenever what makes it has another version."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _MAKERS]
    key = hashlib.sha256(" ".join([_RECIPE, str(OPSET), *versions]).encode()).hexdigest()[:8]
    return f"layer-{shape}-{key}.onnx"


def ensure(config: LayerConfig, cache_dir: Path, shape: Shape, seed: int) -> Path:
    """The exported graph of the layer at a static shape, made if it is not there yet.

    Input `hidden_states`, output `output`: float16 [batch_size, seq_len, hidden_size]. Raises
    CacheError where the folder can't be written.
    """
    data = weights.ensure(config, cache_dir, seed)
    path = data.with_name(file_name(shape))
    if path.exists():
        return path
    with cache.writing(data.parent):
        if not path.exists():
            with cache.replacing(path) as part:
                _export(config, data, shape, seed, part)
    return path


def _export(config: LayerConfig, data: Path, shape: Shape, seed: int, path: Path) -> None:
    import onnx_ir as ir
    import torch

    from memladder.models import layer, onnx_rules

    # The parameters are the mapped file: tracing reads none of their values.
    module = layer.load(config, data, shape, torch.float16, torch.device("cpu")).eval()
    states = torch.empty(shape.batch_size, shape.seq_len, hidden_size(config), dtype=torch.float16)
    # It reports every operator that only torchvision would have.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            module,
            (states,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["hidden_states"],
            output_names=["output"],
            custom_translation_table={torch.ops.aten.linear.default: onnx_rules.linear},
            verbose=False,
        )
    assert program is not None
    onnx_rules.fuse_rotary(program.model)
    _refer(program.model, config, seed)
    path.write_bytes(ir.to_proto(program.model).SerializeToString())


def _refer(model: ir.Model, config: LayerConfig, seed: int) -> None:
    """Make every parameter a reference into the weights' file."""
    import onnx_ir as ir

    for name, entry in weights.entries(config, seed).items():
        value = model.graph.initializers[_PREFIX + name]
        value.const_value = ir.ExternalTensor(
            weights.FILE_NAME,
            entry.offset,
            entry.length,
            ir.DataType.FLOAT16,
            shape=ir.Shape(entry.shape),
            name=value.name or "",
        )
