"""The engine used on its own: a packed layer as a function from hidden states to hidden states."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from memladder import formats
from memladder.case import Shape
from memladder.engine import packed_layer, programs
from memladder.engine.execute import Execution
from memladder.engine.packed_layer import PackedLayer
from memladder.engine.plan import plan
from memladder.errors import UsageError
from memladder.formats.base import Format
from memladder.kernels import naive

# As in the figure: a weight format that comes with an activation format of its own.
_ACTIVATIONS = {"fp8": "fp8", "mxfp8": "mxfp8", "int1": "int8"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Layer:
    """One decoder layer, its weights mapped from the packed file.

    Memory: the weights, once they were used, and one arena, of the last shape that it was called
    with. `activation` is None for float16.
    """

    def __init__(self, packed: PackedLayer, activation: Format | None) -> None:
        self.packed = packed
        self.activation = activation
        self._shape: Shape | None = None
        self._execution: Execution | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Hidden states [batch, sequence, hidden_size] before the layer to those after it.

        Sequences start at position 0 and are causal. Takes float16, bfloat16 or float32 on the CPU,
        computes in float16, and returns a new tensor of the same dtype. Raises UsageError for
        anything else.
        """
        hidden = self.packed.config.values["hidden_size"]
        given = f"{str(states.dtype).removeprefix('torch.')} {list(states.shape)}"
        if states.dim() != 3 or states.shape[2] != hidden or states.dtype not in _FLOATS:
            raise UsageError(
                f"hidden states are {given}; allowed: [batch, sequence, {hidden}] "
                "in float16, bfloat16 or float32"
            )
        if states.device.type != "cpu":
            raise UsageError(f"hidden states are on {states.device}; the engine runs on cpu")
        execution = self._prepared(Shape(*states.shape[:2]))
        with torch.inference_mode():
            execution.input.copy_(states.reshape(-1, hidden))
            execution.run()
        return execution.output.to(states.dtype, copy=True).view(states.shape)

    def _prepared(self, shape: Shape) -> Execution:
        if self._execution is None or self._shape != shape:
            # The old arena goes before the new one comes.
            self._execution = None
            config = self.packed.config
            program = programs.definition(config.model).program(
                config.values, shape, self.activation
            )
            planned = plan(program)
            arena = torch.empty(planned.nbytes, dtype=torch.uint8)
            self._execution = Execution(program, planned, self.packed, naive, arena)
            self._shape = shape
        return self._execution


def load_layer(path: str | Path, *, activation: str | None = None) -> Layer:
    """A layer packed by `memladder quantize`, ready to be called.

    `activation` is the format in which the linear layers' inputs are multiplied: by default the one
    that the figure pairs with the weights', fp8 with fp8, mxfp8 with mxfp8, int8 with int1, and
    fp16 with all others. Raises FormatError for a file that is no packed layer, and for formats
    that don't exist; UsageError for a format that is none of activations.
    """
    packed = packed_layer.load(Path(path))
    name = str(packed.format).partition(":")[0]
    spec = _ACTIVATIONS.get(name, "fp16") if activation is None else activation
    kind = formats.get(spec)
    if not kind.is_activation:
        allowed = ", ".join(key for key in formats.names() if formats.get(key).is_activation)
        raise UsageError(f"{spec} is no activation format; allowed: {allowed}")
    return Layer(packed, None if kind.bits == 16 else kind)
