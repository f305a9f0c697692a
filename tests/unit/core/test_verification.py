import math

from memladder.core.record import dumps
from memladder.core.verification import loads_verification, weights_fit
from tests.unit import examples


def test_a_verification_survives_its_file_even_with_nan() -> None:
    verification = examples.verification(error=math.nan)
    again = loads_verification(dumps(verification))
    assert math.isnan(again.checks[0].error)
    assert not again.agrees


def test_padding_of_weights_is_not_another_format() -> None:
    # LLaMA's int4 with 64 bytes beside it; and with k, 8192 · 1024 elements, left in fp16.
    assert weights_fit(441_221_120 + 64, 441_221_120)
    assert not weights_fit(441_221_120 + 8192 * 1024 * 12 // 8, 441_221_120)
    # fp8 with k in fp16
    assert not weights_fit(855_654_400 + 8192 * 1024, 855_654_400)
