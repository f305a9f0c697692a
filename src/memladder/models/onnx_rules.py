"""The two places where the ONNX graph is not what PyTorch's exporter makes by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset23 as op
from onnxscript.rewriter import RewritePass, pattern


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """`aten.linear` as one Gemm on [tokens, in], with the weight [out, in] as it is stored."""
    *outer, width = x.shape
    flat = op.Reshape(x, op.Constant(value_ints=[-1, width]))
    product = op.Gemm(flat, weight, bias, transB=1)
    return op.Reshape(product, op.Constant(value_ints=[*outer, weight.shape[0]]))


class _Rotary(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """x · cos + rotate_half(x) · sin, with constant cos and sin [1, 1, seq_len, head_dim]."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, middle: Any) -> Any:
        first = op.Slice(x, [0], middle, [3], [1])
        second = op.Slice(x, middle, _allow_other_inputs=True)
        return x * cos + op.Concat(op.Neg(second), first, axis=-1) * sin

    def check(self, context: Any, cos: ir.Value, sin: ir.Value, **_: Any) -> bool:
        """Only constants whose halves are equal can be a rotation's cos and sin."""
        del context
        return all(_halves_agree(ir.convenience.get_const_tensor(table)) for table in (cos, sin))

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        """One RotaryEmbedding, still with the doubled tables."""
        return op.RotaryEmbedding(x, cos, sin, interleaved=0)


def _halves_agree(table: ir.TensorProtocol | None) -> bool:
    if table is None:
        return False
    first, second = np.split(table.numpy(), 2, axis=-1)
    return np.array_equal(first, second)


def fuse_rotary(model: ir.Model) -> None:
    """Replace each spelled-out rotary embedding by one operator, and drop what is left unused.

    PyTorch's tables hold each angle twice; the operator's are [batch_size, seq_len, head_dim / 2].
    """
    RewritePass([_Rotary.rule()])(model)
    rotaries = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    for table in {table for node in rotaries for table in node.inputs[1:3]}:
        assert table is not None
        assert table.const_value is not None
        assert {node.op_type for node in table.consumers()} == {"RotaryEmbedding"}
        shape = rotaries[0].inputs[0].shape
        assert shape is not None
        half = np.split(table.const_value.numpy()[:, 0], 2, axis=-1)[0]
        table.const_value = ir.tensor(np.repeat(half, int(shape[0]), axis=0), name=table.name)
        table.shape = table.const_value.shape
    RemoveUnusedNodesPass()(model)
