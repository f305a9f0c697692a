"""A fused layer as JSON: compiled from ONNX once, and made a program of any shape later.

Nodes are a list, each after those that it reads, which it names by their numbers. What the model's
file called them is left out: another exporter's names would make another packed file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from memladder.core.case import Workload
from memladder.core.errors import MemladderError
from memladder.core.serial import from_json
from memladder.engine.graph.fused import Fused, Glu, NamedNorm, Product
from memladder.engine.graph.nodes import Attention, Input, Node, Pointwise, Rotary, ordered
from memladder.engine.program.lower import lower
from memladder.kernels import functions

_KINDS = {
    kind.__name__.lower(): kind
    for kind in (Input, Product, Glu, NamedNorm, Rotary, Pointwise, Attention)
}


def to_text(fused: Fused) -> str:
    """One line of JSON."""
    nodes = ordered(fused.output)
    places = {id(node): place for place, node in enumerate(nodes)}
    found = {
        "nodes": [_written(node, places) for node in nodes],
        "output": places[id(fused.output)],
        "attention": None if fused.attention is None else places[id(fused.attention)],
        "projected": [places[id(product)] for product in fused.projected],
        "rotated": fused.rotated,
        "matrices": {name: list(sizes) for name, sizes in fused.matrices.items()},
        "vectors": dict(fused.vectors),
        "constants": dict(fused.constants),
    }
    return json.dumps(found)


def _written(node: Node, places: Mapping[int, int]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return places[id(value)]
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(part) for part in value] if isinstance(value, tuple) else value

    kind = type(node).__name__.lower()
    return {"node": kind} | {name: plain(getattr(node, name)) for name in _names(type(node))}


def _names(kind: type[Node]) -> list[str]:
    return [f.name for f in fields(kind) if f.name != "source"]


def from_text(text: str) -> Fused:
    """The layer that `to_text` has written. Raises ValueError for any other text."""
    try:
        found = _read(json.loads(text))
        # Whatever else is wrong with it, no program can be made of it.
        steps = lower(found, Workload(2, 2)).steps
    except (MemladderError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"no fused layer: {' '.join(str(error).split())[:100]}") from None
    except (RecursionError, OverflowError):
        raise ValueError("no fused layer") from None
    known = {*found.matrices, *found.vectors, *found.constants}
    if not known.issuperset(name for step in steps for name in step.weights.values()):
        raise ValueError("no fused layer: it reads what it has not")
    return found


def _read(raw: Mapping[str, Any]) -> Fused:
    nodes: list[Node] = []
    for one in raw["nodes"]:
        nodes.append(_node(one, nodes))
    (entry,) = (node for node in nodes if isinstance(node, Input))
    attention = None if raw["attention"] is None else nodes[raw["attention"]]
    projected = [nodes[place] for place in raw["projected"]]
    if not isinstance(attention, Attention | None):
        raise TypeError("attention that is none")
    if not all(isinstance(node, Product) for node in projected):
        raise TypeError("projections that are none")
    return Fused(
        entry,
        nodes[raw["output"]],
        attention,
        tuple(node for node in projected if isinstance(node, Product)),
        bool(raw["rotated"]),
        from_json(dict[str, tuple[int, int]], raw["matrices"]),
        from_json(dict[str, int], raw["vectors"]),
        from_json(dict[str, int], raw["constants"]),
    )


def _node(raw: Mapping[str, Any], nodes: Sequence[Node]) -> Node:
    kind = _KINDS[raw["node"]]
    hints = get_type_hints(kind)
    values = {name: _value(hints[name], raw[name], nodes) for name in _names(kind)}
    found = kind(source=raw["node"], **values)
    wrong = (
        (isinstance(found, Pointwise) and not functions.has_kernel(found.function))
        or (isinstance(found, Product | Glu) and not functions.follows_product(found.activation))
        or (isinstance(found, NamedNorm) and found.kind not in ("rms", "layer"))
    )
    if wrong:
        raise ValueError(f"no fused layer: no kernel for {found.source[:40]!r}")
    return found


def _value(hint: Any, raw: Any, nodes: Sequence[Node]) -> Any:
    if raw is not None and Node in (hint, *get_args(hint)):
        return tuple(nodes[place] for place in raw) if get_origin(hint) is tuple else nodes[raw]
    if raw is not None and np.ndarray in (hint, *get_args(hint)):
        return np.array(raw, np.float32)
    return from_json(hint, raw)
