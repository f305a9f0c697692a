"""Axes of one size are not one axis: batch and sequence, heads and head size, tokens and width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memladder.core.errors import GraphError
from tests.unit.onnx_models import Spelled, both, imported

_GENERATOR = np.random.default_rng(0)


def _ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def right(path: Path, nodes: Spelled, constants: dict[str, Any], **options: Any) -> None:
    graph = imported(path, nodes, constants, **options)
    torch.testing.assert_close(*both(path, graph), rtol=1e-5, atol=1e-5)


def refused(
    path: Path, nodes: Spelled, constants: dict[str, Any], said: str, **options: Any
) -> None:
    with pytest.raises(GraphError, match=said) as caught:
        imported(path, nodes, constants, **options)
    assert len(str(caught.value).splitlines()) == 1


KEPT = {"keepdims": 1}
# Inputs beside x, attributes, whether it is a mean of columns; the hidden states are [2, 5, 8].
REDUCED: list[tuple[tuple[str, ...], dict[str, int], bool]] = [
    (("last",), KEPT, True),
    (("two",), {}, True),
    (("last", "noop"), KEPT | {"noop_with_empty_axes": 1}, True),
    ((), KEPT | {"noop_with_empty_axes": 1}, True),
    (("none",), KEPT | {"noop_with_empty_axes": 1}, True),
    ((), KEPT, False),
    ((), {}, False),
    (("none",), KEPT, False),
    (("none",), {"noop_with_empty_axes": 0}, False),
    (("first",), KEPT, False),
    (("tokens",), KEPT, False),
    (("rows",), KEPT, False),
    (("all",), KEPT, False),
]
AXES = {
    **{"last": _ints(-1), "two": _ints(2), "none": _ints(), "first": _ints(0), "tokens": _ints(1)},
    **{"rows": _ints(1, 2), "all": _ints(0, 1, 2)},
}


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceSum"])
@pytest.mark.parametrize(("axes", "attributes", "columns"), REDUCED)
def test_what_is_reduced_is_what_is_named(
    operator: str, axes: tuple[str, ...], attributes: dict[str, int], columns: bool, tmp_path: Path
) -> None:
    nodes = [(operator, ("x", *axes[:1]), "m", attributes), ("Sub", ("x", "m"), "y")]
    if columns:
        right(tmp_path, nodes, AXES)
    else:
        refused(tmp_path, nodes, AXES, "something else than columns")


@pytest.mark.parametrize("operator", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"])
def test_other_reductions_are_named(operator: str, tmp_path: Path) -> None:
    nodes = [(operator, ("x", "last"), "m"), ("Sub", ("x", "m"), "y")]
    refused(tmp_path, nodes, AXES, f"unsupported operator {operator}")


@pytest.mark.parametrize("axes", [(), ("rows",), ("tokens",), ("all",)])
def test_axes_of_one_token_are_their_own_mean(axes: tuple[str, ...], tmp_path: Path) -> None:
    nodes = [("ReduceMean", ("x", *axes), "m"), ("Add", ("x", "m"), "y")]
    right(tmp_path, nodes, AXES, shape=(1, 1, 8))


def test_a_mean_without_its_axes_is_a_number(tmp_path: Path) -> None:
    nodes = [
        *[("ReduceMean", "x", "m"), ("Squeeze", "m", "n"), ("Sub", ("x", "n"), "y")],
    ]
    right(tmp_path, nodes, {}, shape=(1, 1, 8))
    refused(tmp_path, nodes, {}, "something else than columns")


@pytest.mark.parametrize("shape", [(2, 5, 8), (5, 5, 8), (8, 8, 8)])
def test_a_mean_over_heads_and_their_columns(shape: tuple[int, ...], tmp_path: Path) -> None:
    constants = {"heads": _ints(*shape[:2], 2, 4), "whole": _ints(*shape), "axes": _ints(-1, -2)}
    nodes = [
        *[("Reshape", ("x", "heads"), "h"), ("ReduceMean", ("h", "axes"), "m")],
        *[("Sub", ("h", "m"), "d"), ("Reshape", ("d", "whole"), "y")],
    ]
    right(tmp_path, nodes, constants, shape=shape)
    nodes[1] = ("ReduceMean", ("h", "axes"), "m")
    refused(tmp_path, nodes, constants | {"axes": _ints(-2)}, "something else", shape=shape)


SQUARE = (4, 4, 4)
SWAPPED: list[tuple[Spelled, str]] = [
    ([("Transpose", "x", "y", {"perm": [1, 0, 2]})], "other axes"),
    ([("Transpose", "x", "y", {"perm": [0, 2, 1]})], "other axes"),
    ([("Transpose", "x", "y", {"perm": [2, 1, 0]})], "other axes"),
    ([("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("Reshape", ("t", "rows"), "r"),
      ("Reshape", ("r", "cube"), "y")], "other axes"),
    ([("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("Add", ("x", "t"), "y")], "other axes"),
    ([("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("MatMul", ("t", "w"), "u"),
      ("Mul", ("x", "u"), "y")], "other axes"),
    ([("Transpose", "x", "t", {"perm": [0, 2, 1]}), ("MatMul", ("t", "w"), "y")], "no linear"),
    ([("Transpose", "x", "t", {"perm": [2, 1, 0]}), ("MatMul", ("t", "w"), "y")], "no linear"),
    ([("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("Concat", ("x", "t"), "c", {"axis": 2}),
      ("MatMul", ("c", "w2"), "y")], "other axes"),
    ([("Reshape", ("x", "flat"), "f"), ("MatMul", ("f", "w16"), "u"),
      ("Reshape", ("u", "cube"), "y")], "no linear"),
    ([("RMSNormalization", ("x", "w"), "y")], "between tokens"),
    ([("LayerNormalization", ("x", "one", "w"), "y")], "between tokens"),
    ([("RMSNormalization", ("x", "one"), "y", {"axis": 1})], "over tokens"),
    ([("Mul", ("x", "by_token"), "y")], "by position"),
    ([("Add", ("x", "by_token"), "y")], "by position"),
    ([("Mul", ("x", "by_sequence"), "y")], "different constants"),
]  # fmt: skip
CONSTANTS = {
    "w": _GENERATOR.normal(size=(4, 4)).astype(np.float32),
    "w2": _GENERATOR.normal(size=(8, 4)).astype(np.float32),
    "w16": _GENERATOR.normal(size=(16, 16)).astype(np.float32),
    "one": np.ones(4, np.float32),
    "rows": _ints(16, 4), "flat": _ints(4, 16), "cube": _ints(4, 4, 4),
    "by_token": np.arange(4, dtype=np.float32).reshape(4, 1),
    "by_sequence": np.arange(4, dtype=np.float32).reshape(4, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "said"), SWAPPED)
def test_axes_of_one_size_are_told_apart(nodes: Spelled, said: str, tmp_path: Path) -> None:
    refused(tmp_path, nodes, CONSTANTS, said, shape=SQUARE)


@pytest.mark.parametrize(
    "nodes",
    [
        [("Transpose", "x", "t", {"perm": [1, 0, 2]}), ("MatMul", ("t", "w"), "u"),
         ("Transpose", "u", "y", {"perm": [1, 0, 2]})],
        [("Transpose", "x", "t", {"perm": [2, 0, 1]}), ("Neg", "t", "u"),
         ("Transpose", "u", "y", {"perm": [1, 2, 0]})],
        [("RMSNormalization", ("x", "one"), "n"), ("Transpose", "n", "t", {"perm": [1, 0, 2]}),
         ("Add", ("t", "one"), "u"), ("Transpose", "u", "y", {"perm": [1, 0, 2]})],
    ],
)  # fmt: skip
def test_axes_may_be_swapped_and_swapped_back(nodes: Spelled, tmp_path: Path) -> None:
    right(tmp_path, nodes, CONSTANTS, shape=SQUARE)


def test_shapes_that_do_not_broadcast(tmp_path: Path) -> None:
    constants = CONSTANTS | {"c": np.ones(3, np.float32), "shape": _ints(3, 4, 4)}
    for node in (
        ("Add", ("x", "c"), "y"),
        ("Mul", ("c", "x"), "y"),
        ("Expand", ("x", "shape"), "y"),
    ):
        refused(
            tmp_path,
            [node],
            constants,
            "do not broadcast|Incompatible|Inference error",
            shape=SQUARE,
        )


# Attention by hand of [sequences, tokens, heads · head size], at sizes that are all alike or not.
LOW = np.where(np.tri(4, dtype=bool), 0, -np.inf).astype(np.float32)


def attention(
    heads: int, size: int, tokens: tuple[int, int] = (4, 4), scores: Spelled = (), **other: Any
) -> tuple[Spelled, dict[str, Any]]:
    """Nodes from x to y, and their constants. `scores` begin with `s` and end with `m`, by default
    a causal mask; others replace nodes by what they make."""
    width = heads * size
    made = [
        *[(f"{n}w", ("MatMul", ("x", f"w{n}"), f"{n}w")) for n in "qkv"],
        *[(f"{n}h", ("Reshape", (f"{n}w", "heads"), f"{n}h")) for n in "qkv"],
        *[(f"{n}t", ("Transpose", f"{n}h", f"{n}t", {"perm": [0, 2, 1, 3]})) for n in "qv"],
        ("kt", ("Transpose", "kh", "kt", {"perm": [0, 2, 3, 1]})),
        ("s", ("MatMul", ("qt", "kt"), "s")),
        *[(node[2], node) for node in scores or [("Add", ("s", "low"), "m")]],
        ("p", ("Softmax", "m", "p", {"axis": -1})),
        ("av", ("MatMul", ("p", "vt"), "av")),
        ("at", ("Transpose", "av", "at", {"perm": [0, 2, 1, 3]})),
        ("y", ("Reshape", ("at", "whole"), "y")),
    ]
    generator = np.random.default_rng(1)
    constants = {f"w{n}": generator.normal(size=(width, width)) * width**-0.5 for n in "qkv"}
    constants = {name: array.astype(np.float32) for name, array in constants.items()}
    constants |= {"heads": _ints(*tokens, heads, size), "whole": _ints(*tokens, width)}
    constants |= {"low": np.where(np.tri(tokens[1], dtype=bool), 0, -np.inf).astype(np.float32)}
    return [other.get(name, node) for name, node in made], constants


@pytest.mark.parametrize(
    ("heads", "size", "tokens"),
    [
        (4, 4, (4, 4)),
        (2, 4, (2, 4)),
        (8, 1, (2, 4)),
        (1, 8, (4, 8)),
        (4, 2, (4, 5)),
        (8, 8, (1, 8)),
    ],
)
def test_attention_where_sizes_are_alike(
    heads: int, size: int, tokens: tuple[int, int], tmp_path: Path
) -> None:
    right(tmp_path, *attention(heads, size, tokens), shape=(*tokens, heads * size))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        # Sequences for tokens, heads for tokens, heads for sequences, of queries or of all.
        ({"qt": ("Transpose", "qh", "qt", {"perm": [1, 2, 0, 3]})}, "no attention"),
        ({"qt": ("Transpose", "qh", "qt", {"perm": [0, 1, 2, 3]})}, "no attention"),
        ({"qt": ("Transpose", "qh", "qt", {"perm": [2, 0, 1, 3]})}, "other sequences or heads"),
        ({"qt": ("Transpose", "qh", "qt", {"perm": [0, 3, 1, 2]})}, ""),
        ({"qt": ("Transpose", "qh", "qt", {"perm": [2, 3, 1, 0]})}, "tokens where columns"),
        ({"vt": ("Transpose", "vh", "vt", {"perm": [2, 0, 1, 3]})}, "other sequences or heads"),
        ({"vt": ("Transpose", "vh", "vt", {"perm": [1, 2, 0, 3]})}, "no attention"),
        ({"kt": ("Transpose", "kh", "kt", {"perm": [2, 0, 3, 1]})}, "other sequences or heads"),
        ({"kt": ("Transpose", "kh", "kt", {"perm": [0, 2, 1, 3]})}, "tokens where columns"),
        ({"at": ("Transpose", "av", "at", {"perm": [2, 0, 1, 3]})}, "other axes"),
        ({"p": ("Softmax", "m", "p", {"axis": 2})}, "something else than keys"),
        ({"p": ("Softmax", "m", "p", {"axis": -2})}, "something else than keys"),
        ({"p": ("Softmax", "m", "p", {"axis": 1})}, "something else than keys"),
    ],
)
def test_attention_over_other_axes_of_the_same_size(
    other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    nodes, constants = attention(4, 4, **other)
    if said:
        refused(tmp_path, nodes, constants, said, shape=(4, 4, 16))
    else:
        right(tmp_path, nodes, constants, shape=(4, 4, 16))


@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (4, 1)])
@pytest.mark.parametrize("place", [1, 2], ids=["repeated", "in turn"])
def test_heads_of_keys_in_both_orders(heads: int, kv: int, place: int, tmp_path: Path) -> None:
    """Queries of kv × 2 heads or of 2 × kv, keys and values with a 1 for the 2."""
    group = heads // kv
    split = _ints(4, kv, group, 4, 4) if place == 2 else _ints(4, group, kv, 4, 4)
    nodes, constants = attention(4, 4)
    keys = {f"w{n}": constants[f"w{n}"][:, : kv * 4] for n in "kv"}
    constants |= keys | {"kv": _ints(4, 4, kv, 4), "split": split, "axis": _ints(place)}
    constants |= {"joined": _ints(4, heads, 4, 4)}
    found: list[Any] = []
    for node in nodes:
        if node[2] in ("kh", "vh"):
            found.append(("Reshape", (f"{node[2][0]}w", "kv"), node[2]))
        elif node[2] == "s":
            found += [("Reshape", ("qt", "split"), "q5"), ("Unsqueeze", ("kt", "axis"), "k5")]
            found += [("MatMul", ("q5", "k5"), "s"), ("Unsqueeze", ("vt", "axis"), "v5")]
        elif node[2] == "av":
            found += [("MatMul", ("p", "v5"), "a5"), ("Reshape", ("a5", "joined"), "av")]
        else:
            found.append(node)
    right(tmp_path, found, constants, shape=(4, 4, 16))


# What is done to scores, and whether it is right; None where a refusal is as good.
SCORES: list[tuple[Spelled, str]] = [
    ([("Add", ("s", "low"), "a"), ("Mul", ("a", "half"), "m")], ""),
    ([("Add", ("s", "low4"), "a"), ("Mul", ("a", "half"), "m")], ""),
    ([("Mul", ("s", "half"), "a"), ("Add", ("a", "low4"), "m")], ""),
    ([("Where", ("seen", "s", "n1e4"), "a"), ("Mul", ("a", "half"), "m")], ""),
    ([("Add", ("s", "low4"), "a"), ("Mul", ("a", "small"), "m")], "a mask of -10000 times"),
    ([("Where", ("seen", "s", "n1e4"), "a"), ("Mul", ("a", "small"), "m")], "a mask of -10000"),
    ([("Add", ("s", "low"), "b"), ("Max", ("b", "n1e4"), "a"), ("Mul", ("a", "small"), "m")],
     "a mask of -10000"),
    ([("Add", ("s", "low"), "a"), ("Mul", ("a", "minus"), "m")], "a mask of -inf"),
    ([("Add", ("s", "low10"), "m")], "not causal"),
    ([("Add", ("s", "low1e9"), "a"), ("Add", ("a", "high"), "m")], "undo a mask"),
    ([("Add", ("s", "low"), "a"), ("Div", ("a", "two"), "b"), ("Tanh", "b", "c"),
      ("Mul", ("c", "two"), "m")], "hyperbolic tangent"),
    ([("Where", ("seen", "s", "n1e4"), "a"), ("Tanh", "a", "c"), ("Mul", ("c", "two"), "m")],
     "hyperbolic tangent"),
    ([("Add", ("s", "half"), "a"), ("Tanh", "a", "c"), ("Mul", ("c", "two"), "d"),
      ("Add", ("d", "low"), "m")], "hyperbolic tangent"),
    ([("Add", ("s", "by_query"), "a"), ("Tanh", "a", "c"), ("Mul", ("c", "two"), "d"),
      ("Add", ("d", "low"), "m")], "hyperbolic tangent"),
    ([("Tanh", "s", "c"), ("Mul", ("c", "minus"), "d"), ("Add", ("d", "low"), "m")], "cap of -1"),
    ([("Tanh", "s", "b"), ("Mul", ("b", "two"), "c"), ("Tanh", "c", "d"), ("Mul", ("d", "two"),
      "e"), ("Add", ("e", "low"), "m")], "hyperbolic tangent"),
    ([("Div", ("s", "two"), "b"), ("Tanh", "b", "c"), ("Mul", ("c", "two"), "d"),
      ("Add", ("d", "low"), "m")], ""),
    ([("Add", ("s", "zero"), "a"), ("Tanh", "a", "c"), ("Mul", ("c", "two"), "d"),
      ("Add", ("d", "low"), "m")], ""),
    ([("Add", ("s", "by_query"), "a"), ("Add", ("a", "low"), "m")], ""),
    ([("Clip", ("s", "minus", "two"), "a"), ("Add", ("a", "low"), "m")], "scores"),
    ([("Min", ("s", "two"), "a"), ("Add", ("a", "low"), "m")], "clipped"),
]  # fmt: skip


@pytest.mark.parametrize(("scores", "said"), SCORES)
def test_masks_scales_and_caps_in_their_order(scores: Spelled, said: str, tmp_path: Path) -> None:
    nodes, constants = attention(2, 4, scores=scores)
    numbers = {"half": 0.5, "two": 2, "small": 1e-3, "minus": -1, "n1e4": -1e4, "zero": 0}
    constants |= {name: np.float32(number) for name, number in numbers.items()}
    constants |= {
        name: np.maximum(LOW, np.float32(low))
        for name, low in (("low4", -1e4), ("low10", -10), ("low1e9", -1e9))
    }
    constants |= {"seen": LOW == 0, "high": np.where(LOW == 0, 0, 1e9).astype(np.float32)}
    constants |= {"by_query": np.arange(4, dtype=np.float32).reshape(4, 1)}
    if said:
        refused(tmp_path, nodes, constants, said, shape=(4, 4, 8))
    else:
        right(tmp_path, nodes, constants, shape=(4, 4, 8))


def test_a_guard_of_probabilities_is_none_where_each_token_sees_itself(tmp_path: Path) -> None:
    guarded = [
        ("IsNaN", "p", "n"),
        ("Where", ("n", "zero", "p"), "g"),
        ("MatMul", ("g", "vt"), "av"),
    ]
    nodes, constants = attention(2, 4)
    found = [made for node in nodes for made in (guarded if node[2] == "av" else [node])]
    right(tmp_path, found, constants | {"zero": np.float32(0)}, shape=(4, 4, 8))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"q_num_heads": 2, "kv_num_heads": 2}, ""),
        ({"q_num_heads": 2, "kv_num_heads": 1}, "heads of 4 columns times heads of 8"),
        ({}, "num_heads"),
        ({"q_num_heads": 2}, "num_heads"),
        ({"q_num_heads": 3, "kv_num_heads": 3}, "3 heads"),
        ({"q_num_heads": 2, "kv_num_heads": 2, "left_window_size": 1}, "left_window_size"),
    ],
)
def test_an_attention_operator_names_its_heads(
    attributes: dict[str, int], said: str, tmp_path: Path
) -> None:
    node = ("Attention", ("x", "x", "x"), "y", {"is_causal": 1, **attributes})
    if said:
        refused(tmp_path, [node], {}, said, shape=(4, 4, 8))
    else:
        right(tmp_path, [node], {}, shape=(4, 4, 8))


def test_a_rotation_of_one_token_does_not_matter(tmp_path: Path) -> None:
    """Softmax of one key is 1, at whatever position it is."""
    angles = 7 * 10000.0 ** (-np.arange(4) / 4)
    tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
    constants = {n: np.tile(t, 2).astype(np.float32).reshape(1, 1, 8) for n, t in tables.items()}
    rotated = [
        ("Slice", ("x", "zero", "four", "last"), "l"),
        ("Slice", ("x", "four", "eight", "last"), "h"),
        ("Neg", "h", "n"), ("Concat", ("n", "l"), "r", {"axis": -1}),
        ("Mul", ("x", "cos"), "a"), ("Mul", ("r", "sin"), "b"), ("Add", ("a", "b"), "q"),
        ("Attention", ("q", "q", "x"), "y", {"is_causal": 1, "q_num_heads": 1, "kv_num_heads": 1}),
    ]  # fmt: skip
    constants |= {"zero": _ints(0), "four": _ints(4), "eight": _ints(8), "last": _ints(-1)}
    right(tmp_path, rotated, constants, shape=(3, 1, 8))
