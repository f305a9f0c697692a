"""What the packages that quantise torch's linear layers share: Inductor's layer, their matrices.

Norms, biases and attention are PyTorch's, compiled as in `pytorch.py`; each linear layer is the
package's own. A matrix goes to the device, is quantised there, and is gone before the next comes.
Each module then runs once: some packages repack their parameters on first use, and a compiled graph
would be traced with the packed ones and given the others.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memladder.frameworks._shared.base import Availability, Job, Session, Setting
from memladder.frameworks.pytorch import InductorSession, PyTorch, layer_dtype
from memladder.models import LayerConfig, tensor_shapes, weights

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from memladder.models.layer import Block

_VECTOR_ITEM_BYTES = 2
_GROUP_SIZES = (128, 64, 32)


class Quantised(PyTorch):
    """One package's linear layers in one number format."""

    wholes = pasts = any_family = False

    package: str
    """The distribution, and the module, that quantises."""

    @abstractmethod
    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """What takes the place of a linear layer that is on its device, not used yet."""

    @abstractmethod
    def held(self, module: nn.Module) -> Mapping[str, int]:
        """Bytes of a used module without its bias: `weights` and, if any, `tables`."""

    @abstractmethod
    def dequantised(self, module: nn.Module) -> torch.Tensor:
        """The matrix [out, in] that a used module stands for, float32 on the CPU."""

    @abstractmethod
    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        """Bytes of a matrix as a used module holds it, with scales, in closed form."""

    @abstractmethod
    def format_settings(self, job: Job) -> Mapping[str, Setting]:
        """What the package was asked for."""

    def used(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        """What `quantise` makes, after one token of zeros: its parameters are final."""
        import torch

        token = linear.weight.new_zeros(1, linear.in_features)
        module = self.quantise(linear, config).eval()
        with torch.inference_mode():
            module(token)
        return module

    def dtype(self, device: torch.device) -> tuple[torch.dtype, str]:
        """What activations are in, and why."""
        return layer_dtype(device)

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """Activations [..., in] as a linear layer takes them, in float32."""
        return states

    def availability(self, device: str) -> Availability:
        """Where PyTorch runs and the package is installed."""
        install = f"pip install 'memladder[{self.package}]'"
        found = super().availability(device)
        if importlib.util.find_spec(self.package) is None:
            return Availability(False, None, f"{self.package} is not installed", install)
        version = importlib.metadata.version(self.package)
        return Availability(found.available, version, found.reason, found.install)

    def weight_bytes(self, job: Job) -> int:
        """Matrices in the format; norms and biases in two bytes an element."""
        return sum(
            self.matrix_bytes(*shape, job) if len(shape) == 2 else _VECTOR_ITEM_BYTES * shape[0]
            for shape in tensor_shapes(job.config).values()
        )

    def reference(self, job: Job) -> np.ndarray:
        """The layer in float32 on the CPU, with the package's matrices dequantised."""
        import torch

        from memladder.models import layer

        path = weights.ensure(job.config, job.cache_dir, job.seed)
        device = torch.device(job.case.device)
        dtype, _ = self.dtype(device)
        cpu = torch.device("cpu")
        true = layer.load(job.config, path, job.case.shape, torch.float32, cpu)
        for name, linear in linears(true.block):
            kept = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
            kept.weight = torch.nn.Parameter(linear.weight.to(device, dtype), requires_grad=False)
            matrix = self.dequantised(self.used(kept, job.config))
            layer.put(true, f"{name}.weight", matrix)
            linear.register_forward_pre_hook(lambda _, inputs: (self.rounded(inputs[0]),))
        states = torch.from_numpy(weights.hidden_states(job.config, job.case.shape, job.seed))
        with torch.inference_mode():
            output: np.ndarray = true(states.float()).numpy()
        return output

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import torch, the layer's module, and the package."""
        return _Session(job, announce, self)


class _Session(InductorSession):
    def __init__(self, job: Job, announce: Callable[[str], None], framework: Quantised) -> None:
        self._framework = framework
        super().__init__(job, announce)
        importlib.import_module(framework.package)

    def dtype(self) -> tuple[torch.dtype, str]:
        """As the package takes it."""
        return self._framework.dtype(self._device)

    def place(self, path: Path) -> Block:
        """Each module's parameters to the device; a linear layer is quantised at once."""
        from safetensors import safe_open

        from memladder.models import layer

        config, framework = self.job.config, self._framework
        made = layer.build(config, self.job.case.shape, self._dtype)
        for name, buffer in list(made.named_buffers(recurse=False)):
            made.register_buffer(name, buffer.to(self._device), persistent=False)
        self._modules: dict[str, nn.Module] = {}
        waiting = dict(linears(made.block))
        for module in dict.fromkeys(name.rpartition(".")[0] for name in tensor_shapes(config)):
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in tensor_shapes(config):
                    if name.rpartition(".")[0] == module:
                        tensor = file.get_tensor(name).to(device=self._device, dtype=self._dtype)
                        layer.put(made, name, tensor)
            del tensor
            if module in waiting:
                quantised = framework.used(waiting.pop(module), config)
                made.block.set_submodule(module, quantised)
                self._modules[module] = quantised
            gc.collect()
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()
        return made.eval().requires_grad_(False)

    def settings(self) -> Mapping[str, Setting]:
        """Inductor's, and the package's."""
        return {**super().settings(), **self._framework.format_settings(self.job)}

    def held(self) -> Mapping[str, int]:
        """`weights`: matrices as the package keeps them, norms and biases."""
        shapes = tensor_shapes(self.job.config)
        vectors = [self._layer.block.get_parameter(n) for n in shapes if len(shapes[n]) == 1]
        total = {"weights": sum(vector.nbytes for vector in vectors)}
        for module in self._modules.values():
            for name, size in self._framework.held(module).items():
                total[name] = total.get(name, 0) + size
        return total


def group_size(config: LayerConfig) -> int:
    """128, or the largest smaller power of two that divides all rows of the layer's matrices:
    packages leave a matrix as it is whose rows their groups do not divide."""
    columns = [shape[1] for shape in tensor_shapes(config).values() if len(shape) == 2]
    return next(size for size in _GROUP_SIZES if not any(width % size for width in columns))


def linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and linear layers of a block, which may be replaced meanwhile."""
    import torch

    for name, module in list(block.named_modules()):
        if isinstance(module, torch.nn.Linear):
            yield name, module
