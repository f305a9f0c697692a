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

from memladder.core.case import Workload
from memladder.models import LayerConfig, cache, hidden_size, tensor_shapes, weights

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

OPSET = 23
_RECIPE = "2"
_MAKERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
PREFIX = "block."


def file_name(shape: Workload) -> str:
    """The graph's file for a shape; differs whenever what makes it has another version."""
    return f"layer-{shape}-{version()}.onnx"


def version() -> str:
    """8 hexadecimal digits that differ whenever what makes graphs has another version."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _MAKERS]
    return hashlib.sha256(" ".join([_RECIPE, str(OPSET), *versions]).encode()).hexdigest()[:8]


def ensure(config: LayerConfig, cache_dir: Path, shape: Workload, seed: int) -> Path:
    """The exported graph of the layer at a static shape, made if it is not there yet.

    Input `hidden_states`, output `output`: float16 [batch_size, seq_len, hidden_size]. Raises
    CacheError where the folder can't be written.
    """
    data = weights.ensure(config, cache_dir, seed)
    path = data.with_name(file_name(shape))
    return cache.made(path, lambda part: _export(config, data, shape, seed, part))


def outline(
    config: LayerConfig, shape: Workload, attention: str | None = None
) -> tuple[bytes, dict[str, float]]:
    """The graph in float32 without weights, as `ensure` writes it with them: that of any seed, and
    of any checkpoint. Its parameters, `PREFIX` before their names, refer to a file that is none.

    Beside it stand the vectors that the graph reads with a number added to what a checkpoint has:
    Gemma's norms, less 1 there. `attention` is how transformers spells it: `eager`, or None for its
    choice. Raises ConfigError where transformers refuses the configuration.
    """
    import onnx_ir as ir
    import torch

    from memladder.models import layer, norms

    module = layer.build(config, shape, torch.float32, attention)
    norms.plain_linears(module.block)
    shifts = norms.unshifted(module.block)
    for number, (name, sizes) in enumerate(tensor_shapes(config).items()):
        # One element for all, another for each: the exporter makes one of what is the same.
        layer.put(module, name, torch.tensor(float(number)).expand(sizes))
    model = _traced(module.eval(), config, shape)
    _refer(model, config, 0)
    found: bytes = ir.to_proto(model).SerializeToString()
    return found, shifts


def _export(config: LayerConfig, data: Path, shape: Workload, seed: int, path: Path) -> None:
    import onnx_ir as ir
    import torch

    from memladder.models import layer

    # The parameters are the mapped file: tracing reads none of their values.
    module = layer.load(config, data, shape, torch.float16, torch.device("cpu")).eval()
    model = _traced(module, config, shape)
    _refer(model, config, seed)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _traced(module: nn.Module, config: LayerConfig, shape: Workload) -> ir.Model:
    import torch

    from memladder.models import onnx_rules

    dtype = next(module.parameters()).dtype
    states = torch.empty(shape.batch_size, shape.seq_len, hidden_size(config), dtype=dtype)
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
    return program.model


def _refer(model: ir.Model, config: LayerConfig, seed: int) -> None:
    """Make every parameter a reference into the weights' file."""
    import onnx_ir as ir

    for name, entry in weights.entries(config, seed).items():
        value = model.graph.initializers[PREFIX + name]
        value.const_value = ir.ExternalTensor(
            weights.FILE_NAME,
            entry.offset,
            entry.length,
            ir.DataType.FLOAT16,
            shape=ir.Shape(entry.shape),
            name=value.name or "",
        )
