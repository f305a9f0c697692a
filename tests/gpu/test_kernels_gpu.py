"""The kernels' own tests, on the GPU: compiled, and with PTX where a format has some."""

from typing import Any

import pytest

from memladder import formats
from memladder.kernels import cuda, naive
from memladder.kernels.cuda import tuning
from memladder.kernels.packed import PackedMatrix
from tests.unit.kernels.test_cached import *  # noqa: F403
from tests.unit.kernels.test_cuda import *  # noqa: F403
from tests.unit.kernels.test_cuda import error, normal, poisoned, quantised, run
from tests.unit.kernels.test_pointwise import *  # noqa: F403
from tests.unit.kernels.test_window import *  # noqa: F403


@pytest.mark.parametrize(("weight", "activation"), [("int4", ""), ("nf4", ""), ("int1", "int8")])
def test_one_row_cut_in_every_way(
    weight: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 37, 8464
    kind = formats.get(weight)
    matrices = [
        PackedMatrix.pack(kind, kind.quantise(normal(n, k, seed=seed, std=0.05))) for seed in (1, 2)
    ]
    x = normal(1, k).half()
    options: dict[str, Any] = {}
    if activation:
        x, options["scales"] = quantised(x, activation)
        options["format"] = activation
    for name, operands in (("matmul", matrices[:1]), ("glu", matrices)):
        expected = poisoned(1, n)
        getattr(naive, name)(x, *operands, expected, **options)
        known = set(tuning.asked())
        run(getattr(cuda, name), x, *operands, poisoned(1, n), **options)
        ((key, cuts),) = [item for item in tuning.asked().items() if item[0] not in known]
        assert len(cuts) > 2
        for cut in cuts:
            monkeypatch.setitem(tuning._preferred, key, cut)
            found = poisoned(1, n)
            run(getattr(cuda, name), x, *operands, found, **options)
            assert error(found, expected) < (5e-4 if name == "matmul" else 7e-4), cut
