"""Bytes of weights as they are stored: by a number format, or by a checkpoint's own scheme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memladder.frameworks._rules.question import Question, UnpredictableError
from memladder.models.architecture import Architecture, Split, TensorSpec

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}
_NVFP4_GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored: `bits` an element, and for each group `group_bits` of scales.

    A group is `group` neighbours of a row; None: the row; 0: the whole matrix. `block` (rows,
    columns) instead groups both ways. `column_bits` are for each column (GPTQ's `g_idx`).

    >>> Scheme(4, 128, 16).matrix(8192, 8192)
    (33554432, 1048576)
    """

    bits: float
    group: int | None = None
    group_bits: float = 0
    block: tuple[int, int] | None = None
    column_bits: int = 0

    def matrix(self, rows: int, columns: int) -> tuple[int, int]:
        """Bytes of codes and of scales of a matrix [rows, columns]."""
        if self.block is not None:
            groups = -(-rows // self.block[0]) * -(-columns // self.block[1])
        elif self.group == 0:
            groups = 1
        else:
            groups = rows * -(-columns // (self.group or columns))
        codes = -(-rows * columns * self.bits // 8)
        return int(codes), int(-(-(groups * self.group_bits + columns * self.column_bits) // 8))


NF4 = Scheme(4, 64, 8 + 32 / 256)
"""bitsandbytes with double quantisation (arXiv:2305.14314, section 3)."""
SCHEMES: Mapping[str, Scheme] = {
    "fp16": Scheme(16),
    "int8": Scheme(8, None, 32),
    "fp8": Scheme(8, None, 32),
    "mxfp8": Scheme(8, 32, 8),
    "int4": Scheme(4, 128, 16),
    "nf4": Scheme(4, 64, 16),
    "mxfp4": Scheme(4, 32, 8),
    "int2": Scheme(2, 128, 16),
    "int1": Scheme(1, None, 32),
    "q4_0": Scheme(4, 32, 16),
    "q8_0": Scheme(8, 32, 16),
}


def scheme(name: str) -> Scheme:
    """A scheme by its format's name. Raises UnpredictableError."""
    if name not in SCHEMES:
        raise UnpredictableError(f"unknown format {name[:40]!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class Stored:
    """Bytes of the layers' codes and scales, and of the tables around them."""

    weights: int = 0
    scales: int = 0
    around: int = 0


@dataclass(frozen=True)
class Quantises:
    """The scheme of a tensor in a layer of that number; None where it stays as it is.

    `by_layer`: layers of one group may differ.
    """

    scheme_of: Callable[[TensorSpec, int], Scheme | None]
    by_layer: bool = False


def stored(
    question: Question, quantises: Quantises, item_bytes: int = 2, pad_vocabulary: bool = True
) -> Stored:
    """What the fullest of the question's ranks holds."""
    ranks, kv_heads = question.ranks, question.model.kv_heads
    weights = scales = around = 0
    for group in question.groups():
        for tensor in group.layer.tensors:
            for scheme, count in _schemes(group.numbers, tensor, quantises):
                code, scale = tensor_bytes(tensor, scheme, ranks, kv_heads, item_bytes)
                weights += count * code
                scales += count * scale
    if question.whole:
        for tensor in question.model.embeddings:
            if tensor.split is Split.VOCABULARY and not pad_vocabulary and ranks == 1:
                around += item_bytes * tensor.elements
            else:
                around += item_bytes * padded(tensor).elements_of_rank(ranks, kv_heads)
    return Stored(weights, scales, around)


def padded(tensor: TensorSpec, multiple: int = 64) -> TensorSpec:
    """A table of the vocabulary, its rows padded."""
    if tensor.split is not Split.VOCABULARY:
        return tensor
    rows = -(-tensor.shape[0] // multiple) * multiple
    return TensorSpec(tensor.name, (rows, *tensor.shape[1:]), tensor.split)


def _schemes(
    numbers: Sequence[int], tensor: TensorSpec, quantises: Quantises
) -> list[tuple[Scheme | None, int]]:
    if not tensor.linear or len(tensor.shape) != 2:
        return [(None, len(numbers))]
    if not quantises.by_layer:
        return [(quantises.scheme_of(tensor, numbers[0]), len(numbers))]
    return list(Counter(quantises.scheme_of(tensor, number) for number in numbers).items())


def tensor_bytes(
    tensor: TensorSpec, scheme: Scheme | None, ranks: int, kv_heads: int, item_bytes: int = 2
) -> tuple[int, int]:
    """Bytes of codes and scales that a rank holds of one tensor."""
    elements = tensor.elements_of_rank(ranks, kv_heads)
    if scheme is None:
        return item_bytes * elements, 0
    rows, columns = tensor.shape
    if tensor.split is Split.COLUMNS:
        columns = elements // (rows * tensor.count)
    else:
        rows = elements // (columns * tensor.count)
    codes, scales = scheme.matrix(rows, columns)
    return tensor.count * codes, tensor.count * scales


def everywhere(scheme: Scheme | None) -> Quantises:
    """All linear layers in one scheme."""

    def chosen(tensor: TensorSpec, number: int) -> Scheme | None:
        del tensor, number
        return scheme

    return Quantises(chosen)


def checkpoint(model: Architecture) -> Quantises:
    """What the file's `quantization_config` says. Raises UnpredictableError for an unknown one."""
    config = model.quantisation
    if config is None:
        return everywhere(None)
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    reader = _READERS.get(method)
    if reader is None:
        raise UnpredictableError(
            f"no rules for quant_method {method[:40]!r}; known: {', '.join(sorted(_READERS))}"
        )
    scheme = reader(config)
    ignored = _ignored(config)
    experts_only = method == "mxfp4"

    def chosen(tensor: TensorSpec, number: int) -> Scheme | None:
        if experts_only and "experts" not in tensor.name:
            return None
        return None if ignored(tensor.name, number) else scheme

    return Quantises(chosen, by_layer=True)


def _bits(config: Mapping[str, Any], name: str, allowed: tuple[int, ...]) -> int:
    value = config.get(name)
    if value not in allowed:
        raise UnpredictableError(f"quantization_config: {name} {value!r} is not one of {allowed}")
    return int(value)


def _group(config: Mapping[str, Any], default: int) -> int | None:
    value = config.get("group_size", default)
    if not _whole(value) and value != -1:
        raise UnpredictableError(
            f"quantization_config: group_size {value!r} is neither a whole number nor -1"
        )
    return None if value == -1 else int(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _block(config: Mapping[str, Any], name: str, default: list[int]) -> tuple[int, int]:
    value = config.get(name) or default
    if not isinstance(value, list) or len(value) != 2 or not all(map(_whole, value)):
        raise UnpredictableError(f"quantization_config: {name} {value!r} is not two whole numbers")
    return value[0], value[1]


def _gptq(config: Mapping[str, Any]) -> Scheme:
    bits = _bits(config, "bits", (2, 3, 4, 8))
    return Scheme(bits, _group(config, 128), 16 + bits, column_bits=32)


def _awq(config: Mapping[str, Any]) -> Scheme:
    bits = _bits({"bits": config.get("bits", config.get("w_bit"))}, "bits", (4, 8))
    size = config.get("group_size", config.get("q_group_size", 128))
    return Scheme(bits, _group({"group_size": size}, 128), 16 + bits)


def _fp8(config: Mapping[str, Any]) -> Scheme:
    if config.get("weight_block_size"):
        return Scheme(8, None, 32, block=_block(config, "weight_block_size", []))
    return Scheme(8, 0, 32)


def _bitsandbytes(config: Mapping[str, Any]) -> Scheme:
    if config.get("load_in_8bit"):
        return Scheme(8, None, 32)
    return NF4 if config.get("bnb_4bit_use_double_quant") else Scheme(4, 64, 32)


def _compressed(config: Mapping[str, Any]) -> Scheme:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnpredictableError("quantization_config: config_groups are missing")
    schemes = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise UnpredictableError("quantization_config: a group says nothing of weights")
        schemes.add(_compressed_weights(weights))
    if len(schemes) > 1:
        raise UnpredictableError("quantization_config: groups of several schemes")
    return schemes.pop()


def _compressed_weights(weights: Mapping[str, Any]) -> Scheme:
    """compressed-tensors' QuantizationArgs; NVFP4 has float8 scales of 16."""
    bits = _bits(weights, "num_bits", (2, 3, 4, 8))
    strategy = str(weights.get("strategy"))
    if weights.get("type") == "float" and bits == 4:
        size = weights.get("group_size") or _NVFP4_GROUP
        return Scheme(4, _group({"group_size": size}, _NVFP4_GROUP), 8)
    if strategy == "tensor":
        return Scheme(bits, 0, 32)
    if strategy == "block":
        return Scheme(bits, None, 32, block=_block(weights, "block_structure", [128, 128]))
    if strategy == "channel":
        return Scheme(bits, None, 32 if weights.get("type") == "float" else 16)
    zeros = 0 if weights.get("symmetric", True) else bits
    return Scheme(bits, _group(weights, 128), 16 + zeros)


def _modelopt(config: Mapping[str, Any]) -> Scheme:
    inner = config.get("quantization", config)
    if not isinstance(inner, Mapping):
        raise UnpredictableError(f"quantization_config: quantization {inner!r} is not an object")
    algorithm = str(inner.get("quant_algo", config.get("quant_algo", ""))).upper()
    if algorithm == "NVFP4":
        return Scheme(4, _NVFP4_GROUP, 8)
    if algorithm == "FP8":
        return Scheme(8, 0, 32)
    raise UnpredictableError(f"quantization_config: no rules for quant_algo {algorithm[:40]!r}")


def _fbgemm(config: Mapping[str, Any]) -> Scheme:
    del config
    return Scheme(8, None, 32)


def _mxfp4(config: Mapping[str, Any]) -> Scheme:
    del config
    return SCHEMES["mxfp4"]


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "nvfp4": _modelopt,
    "mxfp4": _mxfp4,
}


def _ignored(config: Mapping[str, Any]) -> Callable[[str, int], bool]:
    """Whether a module is left out: the lists that the methods have for that, joined."""
    names: list[str] = []
    for key in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules",
                "llm_int8_skip_modules"):  # fmt: skip
        value = config.get(key)
        names += [str(item) for item in value] if isinstance(value, list) else []
    plain = [name.lower() for name in names if not name.startswith("re:") and "*" not in name]
    patterns = []
    for name in names:
        try:
            if name.startswith("re:"):
                patterns.append(re.compile(name[3:]))
            elif "*" in name:
                patterns.append(re.compile(re.escape(name).replace(r"\*", ".*")))
        except re.error as error:
            raise UnpredictableError(
                f"quantization_config: pattern {name[:40]!r}: {error}"
            ) from None
    by_layer = {name for name in plain if re.search(r"\.\d+\.", name)}
    anywhere = [name for name in plain if name not in by_layer]

    def ignored(tensor: str, number: int) -> bool:
        module = tensor.rpartition(".")[0].lower()
        full = f"model.layers.{number}.{module}"
        if any(part == module or part in module.split(".") for part in anywhere):
            return True
        if by_layer and any(_covers(name, number, module) for name in by_layer):
            return True
        return any(pattern.search(full) for pattern in patterns)

    return ignored


def _covers(name: str, number: int, module: str) -> bool:
    """Whether `…layers.3.mlp` names the module, or a module around it, in layer 3."""
    found = re.search(rf"\.{number}\.(.+)", name)
    return found is not None and (module == found[1] or module.startswith(f"{found[1]}."))


def item_bytes(dtype: str) -> int:
    """Bytes of a number; two for a dtype that engines convert."""
    return 2 if dtype == "float32" else _ITEM_BYTES.get(dtype, 2)
