"""Which norm, or product, a module is: told by what it gives for what it takes, never by a name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_EPS = ("eps", "variance_epsilon", "norm_eps", "epsilon")
# Of float32 sums over a row, in another order.
_CLOSE = 2e-5


@dataclass(frozen=True)
class Kind:
    """`kind` rms or layer; `shift` is added to the stored weight (Gemma: 1)."""

    kind: str
    eps: float
    shift: float = 0.0


def known(module: nn.Module, given: Tensor, found: Tensor) -> Kind | None:
    """The norm over the last dimension that gives `found` for `given`; None if it is no such."""
    eps = next((getattr(module, name) for name in _EPS if hasattr(module, name)), None)
    own = dict(module.named_parameters())
    if not isinstance(eps, float | int) or own.keys() - {"weight", "bias"}:
        return None
    weight, bias = own.get("weight"), own.get("bias")
    for kind in ("rms", "layer"):
        for shift in (0.0, 1.0):
            one = Kind(kind, float(eps), shift)
            if agree(normed(given, one, weight, bias), found):
                return one if weight is not None else Kind(kind, float(eps))
    return None


def normed(x: Tensor, norm: Kind, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A norm over the last dimension, in float32."""
    x = x.float()
    if norm.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps)
    x = x if weight is None else x * (weight.float() + norm.shift)
    return x if bias is None else x + bias.float()


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same within float32's roundings."""
    if found.shape != expected.shape:
        return False
    error = torch.linalg.vector_norm(found.double() - expected.double())
    return bool(error <= _CLOSE * torch.linalg.vector_norm(expected.double()))


def unshifted(block: nn.Module) -> dict[str, float]:
    """Put norms that multiply by what is stored in place of those that add a number to it first.

    The layer's parameters are on the meta device before and after, under the same names. By the
    names of the weights that are meant: what has to be added to what a checkpoint stores.
    """
    found = {}
    for name, module in list(block.named_modules()):
        own = dict(module.named_parameters())
        weight = own.get("weight")
        if own.keys() != {"weight"} or weight is None or weight.dim() != 1:
            continue
        generator = torch.Generator().manual_seed(0)
        drawn = 1 + 0.1 * torch.randn(weight.shape, generator=generator)
        x = torch.randn(3, len(drawn), generator=generator)
        module._parameters["weight"] = nn.Parameter(drawn, requires_grad=False)
        try:
            with torch.inference_mode():
                kind = known(module, x, module(x))
        except (RuntimeError, TypeError, ValueError):
            # It takes something else: no norm.
            kind = None
        finally:
            module._parameters["weight"] = weight
        if kind is not None and kind.shift and kind.kind == "rms":
            plain = nn.RMSNorm(len(drawn), kind.eps, device="meta")
            plain.weight = weight
            block.set_submodule(name, plain)
            found[f"{name}.weight"] = kind.shift
    return found


def plain_linears(block: nn.Module) -> None:
    """Put torch's own linear layers in place of those that spell the same product otherwise, by
    transposing a stored matrix, say: an exporter would keep the transposed one.

    The layer's parameters are on the meta device before and after, under the same names.
    """
    for name, module in list(block.named_modules()):
        if not isinstance(module, nn.Linear) or type(module) is nn.Linear:
            continue
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 5, generator=generator)
        try:
            small = type(module)(5, 3, bias=True)
            with torch.inference_mode():
                same = agree(small(x), nn.functional.linear(x, small.weight, small.bias))
        except (RuntimeError, TypeError, ValueError):
            continue
        if same:
            plain = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            plain.in_features, plain.out_features = module.in_features, module.out_features
            block.set_submodule(name, plain)
