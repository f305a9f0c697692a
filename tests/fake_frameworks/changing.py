"""A package whose linear layers transpose and widen their weight when they first run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from memladder.frameworks._shared.base import Job, Setting
from memladder.frameworks._shared.torch_quantised import Quantised
from memladder.models import LayerConfig


class _Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        self.bias = linear.bias
        self.packed = False

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            self.weight.data = self.weight.data.float().t().contiguous()
            self.packed = True
        product = states.float() @ self.weight
        return (product if self.bias is None else product + self.bias.float()).to(states.dtype)


class Changing(Quantised):
    title = "Changing"
    package = "torch"

    def quantise(self, linear: nn.Linear, config: LayerConfig) -> nn.Module:
        return _Linear(linear)

    def held(self, module: nn.Module) -> Mapping[str, int]:
        return {"weights": module.get_parameter("weight").nbytes}

    def dequantised(self, module: nn.Module) -> torch.Tensor:
        return module.get_parameter("weight").t().float().contiguous()

    def matrix_bytes(self, rows: int, columns: int, job: Job) -> int:
        return 4 * rows * columns

    def format_settings(self, job: Job) -> Mapping[str, Setting]:
        return {}


FRAMEWORK = Changing()
