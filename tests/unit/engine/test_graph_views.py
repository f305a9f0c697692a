"""Layout operators as views, against the same operators in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memladder.core.case import Workload
from memladder.engine.frontend import views
from memladder.engine.frontend.axes import LayoutError, token_axes
from memladder.engine.frontend.views import Value
from memladder.engine.graph.nodes import Input

TOKENS = Workload(2, 3)
NODE = Input(24, "x")
START = views.whole(NODE, (*token_axes(TOKENS), (24,)), TOKENS)
ARRAY = np.arange(2 * 3 * 24, dtype=np.float64).reshape(2, 3, 24)


def materialised(value: Value, states: np.ndarray = ARRAY) -> np.ndarray:
    """The tensor that a value stands for, computed from its definition."""
    tokens = value.tokens
    flat = states.reshape(tokens.batch_size, tokens.seq_len, -1)
    total = np.zeros(())
    for term in value.terms:
        part = flat[:, :, term.index] * term.scale
        if term.table is not None:
            part = part * term.table[np.newaxis]
        total = total + part
    kinds = [f for axis in value.axes for f in axis]
    columns = iter(range(2, total.ndim))
    order = [{"b": 0, "s": 1}[f] if isinstance(f, str) else next(columns) for f in kinds]
    order += [place for place in range(total.ndim) if place not in order]
    return total.transpose(order).reshape(value.shape)


def test_a_fused_projection_is_taken_apart() -> None:
    # BLOOM: of each head's query, key and value, the keys.
    value = views.reshape(START, (2, 3, 4, 3, 2))
    keys = views.transpose(views.take(value, 3, 1), (0, 2, 1, 3))
    assert keys.axes == (("b",), (4,), ("s",), (2,))
    np.testing.assert_array_equal(
        materialised(keys), ARRAY.reshape(2, 3, 4, 3, 2)[:, :, :, 1].transpose(0, 2, 1, 3)
    )
    assert keys.terms[0].index.reshape(-1).tolist() == [2, 3, 8, 9, 14, 15, 20, 21]


def test_repeated_heads_are_indices_that_occur_again() -> None:
    value = views.reshape(START, (2, 3, 4, 1, 6))
    found = views.reshape(views.expand(value, (2, 3, 4, 5, 6)), (2, 3, 20, 6))
    expected = np.repeat(ARRAY.reshape(2, 3, 4, 6), 5, axis=2)
    np.testing.assert_array_equal(materialised(found), expected)


def test_a_rotation_is_a_sum_of_two_terms() -> None:
    generator = np.random.default_rng(0)
    cos, sin = generator.normal(size=(2, 1, 3, 1, 6))
    heads = views.reshape(START, (2, 3, 4, 6))
    first, second = (views.take(heads, 3, np.arange(6)[part]) for part in (slice(3), slice(3, 6)))
    turned = views.concat([views.scaled(second, -1.0), first], 3)
    found = views.add(views.times(heads, cos), views.times(turned, sin))
    array = ARRAY.reshape(2, 3, 4, 6)
    rotated = np.concatenate((-array[..., 3:], array[..., :3]), axis=-1)
    np.testing.assert_allclose(materialised(found), array * cos + rotated * sin, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: views.reshape(v, (6, 24)),
        lambda v: views.reshape(views.reshape(v, (1, 6, 4, 6)), (2, 3, 8, 3)),
        lambda v: views.reshape(views.transpose(views.reshape(v, (2, 3, 4, 6)), (0, 2, 1, 3)),
                                (8, 3, 6)),
        lambda v: views.take(v, 2, np.arange(0, 24, 2)),
        lambda v: views.take(v, 2, np.array([5])),
        lambda v: views.expand(views.reshape(v, (2, 3, 1, 24)), (7, 2, 3, 5, 24)),
    ],
)  # fmt: skip
def test_shapes_and_values(change: Callable[[Value], Value]) -> None:
    found = change(START)
    assert materialised(found).shape == found.shape


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chains_of_layout_operators_are_numpys(data: st.DataObject) -> None:
    value, array = views.reshape(START, (2, 3, 4, 3, 2)), ARRAY.reshape(2, 3, 4, 3, 2)
    for _ in range(4):
        kind = data.draw(st.sampled_from(("transpose", "take", "unsqueeze", "concat")))
        if kind == "transpose":
            order = data.draw(st.permutations(range(array.ndim)))
            value, array = views.transpose(value, order), array.transpose(order)
        elif kind == "unsqueeze":
            place = data.draw(st.integers(0, array.ndim))
            array = np.expand_dims(array, place)
            value = views.reshape(value, array.shape)
        else:
            columns = [a for a, f in enumerate(value.axes) if f and isinstance(f[0], int)]
            if not columns:
                continue
            axis = data.draw(st.sampled_from(columns))
            if kind == "take":
                size = data.draw(st.integers(1, array.shape[axis]))
                index = np.array(data.draw(st.permutations(range(array.shape[axis])))[:size])
                value, array = views.take(value, axis, index), array.take(index, axis)
            else:
                value = views.concat([value, views.scaled(value, 2.0)], axis)
                array = np.concatenate((array, 2 * array), axis)
    assert value.shape == array.shape
    np.testing.assert_allclose(materialised(value), array)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: views.reshape(v, (3, 2, 24)), "tears tokens apart"),
        (lambda v: views.reshape(v, (2, 3, 48)), "can't become"),
        (lambda v: views.take(v, 1, np.array([0])), "some of the tokens"),
        (lambda v: views.table(v, np.arange(2.0).reshape(2, 1, 1)), "different constants"),
    ],
)
def test_layouts_that_tokens_do_not_have(
    change: Callable[[Value], Value], said: str, tmp_path: Path
) -> None:
    with pytest.raises(LayoutError, match=said):
        change(START)
