"""The engine used on its own: a packed layer as a function from hidden states to hidden states."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from memladder import formats
from memladder.core import digests
from memladder.core.case import Workload
from memladder.core.errors import OverflowedError, UsageError
from memladder.engine.compile import bundle
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.program.plan import plan
from memladder.engine.program.steps import Program
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.formats._shared.base import Format
from memladder.models.cache import default_dir

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CHECKS = ("output", "steps", "none")
# Kernels have a workspace that is the process's, and a layer one arena: one call at a time.
_RUNNING = threading.Lock()


class RunnableLayer:
    """One decoder layer: on the CPU its weights are mapped from the packed file, on a GPU copied.

    Memory: the weights, and one arena, of the last shape that it was called with. `program` gives
    the steps at a shape. `check`: see `load_layer`.

    Threads may share a layer: calls, of this one or of others, wait for each other. A copy shares
    the weights, which nothing changes, and has an arena of its own. A layer can't be pickled:
    another process loads it from its file, which both then have in memory once.
    """

    def __init__(
        self,
        packed: PackedLayer,
        program: Callable[[Workload], Program],
        device: torch.device,
        check: str = "output",
    ) -> None:
        if check not in _CHECKS:
            raise UsageError(f"check {check!r} is not one of {', '.join(_CHECKS)}")
        self.packed = packed
        self.device = device
        self.check = check
        self._program = program
        kernels = "naive" if device.type == "cpu" else "cuda"
        self._kernels = importlib.import_module(f"memladder.kernels.{kernels}")
        self._shape: Workload | None = None
        self._execution: Execution | None = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Hidden states [batch, sequence, hidden_size] before the layer to those after it.

        Sequences start at position 0 and are causal. Takes float16, bfloat16 or float32 on the
        layer's device, computes in float16, and returns a new tensor of the same dtype. Raises
        UsageError for anything else, OverflowedError for an output that is not finite.
        """
        hidden = self._require(states)
        # Kernels are launched on the current GPU.
        current = torch.cuda.device_of(states)  # type: ignore[no-untyped-call]
        with _RUNNING, torch.inference_mode(), current:
            execution = self._prepared(Workload(*states.shape[:2]))
            if self._done is not None:
                # The last call may have been on another stream.
                self._done.wait()
            execution.input.copy_(states.reshape(-1, hidden))
            where = None
            if self.check == "steps":
                where = execution.first_overflow()
            else:
                execution.run()
            found = execution.output.to(states.dtype, copy=True).view(states.shape)
            if self.device.type == "cuda":
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._done.record()
            if self.check != "none" and (where is not None or not found.isfinite().all()):
                self._refuse(states, execution)
        return found

    def _require(self, states: Tensor) -> int:
        """The hidden size. Raises UsageError for states that this layer does not take."""
        hidden = self.packed.form.fused.hidden_size
        allowed = f"[batch, sequence, {hidden}] in float16, bfloat16 or float32"
        if not isinstance(states, Tensor):
            kind = type(states).__name__
            raise UsageError(f"hidden states are of type {kind}; allowed: a torch tensor {allowed}")
        given = f"{str(states.dtype).removeprefix('torch.')} {list(states.shape)}"
        if states.dim() != 3 or states.shape[2] != hidden or states.dtype not in _FLOATS:
            raise UsageError(f"hidden states are {given}; allowed: {allowed}")
        if states.layout != torch.strided:
            raise UsageError(f"hidden states are {states.layout}; allowed: torch.strided")
        if states.device != self.device:
            raise UsageError(f"hidden states are on {states.device}, the layer on {self.device}")
        return hidden

    def _refuse(self, states: Tensor, execution: Execution) -> NoReturn:
        """Say where the output is not finite from: a second pass, which looks at every step."""
        if not states.isfinite().all():
            raise OverflowedError("hidden states hold NaN or infinity")
        execution.input.copy_(states.reshape(-1, states.shape[2]))
        if not execution.input.isfinite().all():
            most = float(states.abs().max())
            raise OverflowedError(
                f"hidden states hold {most:.3g}; the layer computes in float16, which ends at 65504"
            )
        raise OverflowedError(
            "values within the layer are beyond float16's 65504, first those of "
            f"{execution.first_overflow() or 'no step alone'}"
        )

    def __copy__(self) -> RunnableLayer:
        """A layer of the same weights with an arena of its own."""
        return RunnableLayer(self.packed, self._program, self.device, self.check)

    def __deepcopy__(self, memo: dict[int, Any]) -> RunnableLayer:
        """The same: weights are never changed."""
        return self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """What pickle asks for."""
        raise UsageError(
            "a layer can't be pickled: its weights are a mapped file; "
            "call load_layer with its path in the other process"
        )

    def _prepared(self, shape: Workload) -> Execution:
        if self._execution is None or self._shape != shape:
            # The old arena goes before the new one comes.
            self._execution = None
            program = self._program(shape)
            planned = plan(program)
            size = arena_bytes(program, planned, self._kernels)
            arena = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._execution = Execution(program, planned, self.packed, self._kernels, arena)
            self._shape = shape
        return self._execution


def load_layer(
    path: str | Path,
    *,
    activation: str | None = None,
    device: str | torch.device | None = None,
    check: str = "output",
) -> RunnableLayer:
    """A layer packed by `memladder quantize`, ready to be called.

    `device` is a torch device, `cpu` or `cuda:N`: by default PyTorch's current GPU where it has
    one, else the CPU.

    `activation` is the format in which the linear layers' inputs are multiplied: by default the one
    that the figure pairs with the weights', fp8 with fp8, mxfp8 with mxfp8, int8 with int1, and
    fp16 with all others.

    `check`: where values beyond float16 are looked for. `output`, once a call: NaN and infinity
    there are an OverflowedError that names where they came from (it waits for the GPU); `steps`:
    what each step writes, since a clip or a ReLU can hide an infinity from the output, at about
    twice the time; `none`.

    Raises FormatError for a file that is no packed layer, and for formats that don't exist;
    UsageError for a format that is none of activations, and for a device that is not here.
    """
    where = torch_device(device)
    digests.require(Path(path))
    packed = packed_layer.load(Path(path))
    rounded = activation_format(activation or packed.form.format.activation)
    placed = _placed(packed, where)
    return RunnableLayer(placed, lambda shape: packed.form.program(shape, rounded), where, check)


def activation_format(spec: str) -> Format | None:
    """A format of activations, None for fp16. Raises FormatError and UsageError."""
    kind = formats.get(spec)
    if not kind.is_activation:
        allowed = ", ".join(key for key in formats.names() if formats.get(key).is_activation)
        raise UsageError(f"{spec} is no activation format; allowed: {allowed}")
    return None if kind.bits == 16 else kind


def load_compiled(
    folder: Path, device: str | torch.device | None = None, check: str = "output"
) -> tuple[RunnableLayer, Workload]:
    """The layer in a folder of `memladder compile`, and the shape that it was compiled for.

    `device` and `check` as in `load_layer`. Raises FormatError for a folder that is none.
    """
    where = torch_device(device)
    compiled = bundle.load(folder / bundle.PROGRAM, folder / bundle.WEIGHTS)
    placed = _placed(compiled.weights, where)
    return RunnableLayer(placed, lambda _: compiled.program, where, check), compiled.shape


def _placed(packed: PackedLayer, device: torch.device) -> PackedLayer:
    """On a GPU a copy in one block, and the cuts of kernels that were tuned there."""
    if device.type == "cpu":
        return packed
    use_tuned_cuts()
    block = torch.empty(packed_layer.device_bytes(packed), dtype=torch.uint8, device=device)
    return packed_layer.on_device(packed, block)


def use_tuned_cuts() -> None:
    """Let kernels take the cuts that `memladder tune` has kept for this GPU, if it has."""
    from memladder import __version__
    from memladder.kernels.cuda import tuning

    tuning.load(tuning.path(default_dir(), __version__))


def torch_device(wanted: str | torch.device | None) -> torch.device:
    """`cpu` or `cuda:N`; None is PyTorch's current GPU where it has one, else the CPU.

    Raises UsageError for one that is not here.
    """
    count = torch.cuda.device_count()
    try:
        found = torch.device(wanted or ("cuda" if count else "cpu"))
    except RuntimeError:
        raise UsageError(f"{str(wanted)[:40]!r} is no device; allowed: cpu, cuda:N") from None
    if found.type == "cuda" and found.index is None and count:
        # Asking for the current GPU would bring CUDA up, and a lean context has to come first.
        begun = torch.cuda.is_initialized()
        found = torch.device("cuda", torch.cuda.current_device() if begun else 0)
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= count):
        gpus = f"cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
        raise UsageError(f"{found} can't be used; here are: cpu, {gpus}")
    return found
