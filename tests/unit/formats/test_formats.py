"""What all formats share: names and parameters, sizes, dequantisation, and how much noise."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from memladder import formats
from memladder.core.errors import FormatError
from memladder.formats._shared.base import Quantised
from tests.unit.code_tables import E2M1, E4M3, E5M2, NORMAL_FLOAT, NUMBERS


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices are small: threads would wait for each other, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_format_is_one_file_of_the_folder() -> None:
    assert {"int2", "mxfp4"} <= set(formats.names())
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")}
    assert set(formats.names()) == files - {"__init__"}
    assert list(formats.names()) == sorted(formats.names())


def test_listing_formats_does_not_import_torch() -> None:
    code = (
        "import sys; from memladder import formats; print(formats.names(), 'torch' in sys.modules)"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert found == f"{formats.names()} False\n"


@pytest.mark.parametrize("name", formats.names())
def test_what_a_format_says_of_itself(name: str) -> None:
    kind = formats.get(name)
    for attribute in ("activation", "is_row", "is_weight", "is_integer", "is_interleaved"):
        assert formats.literal(name, attribute) == getattr(kind, attribute)
    assert formats.get(kind.activation).is_activation
    # The pairs of the paper's figure; all other weights are multiplied with fp16.
    pairs = {"fp8": "fp8", "mxfp8": "mxfp8", "int1": "int8"}
    assert kind.activation == pairs.get(name, "fp16")
    # What tensor cores multiply, and the numbers that fill a byte: largest, mantissa, least step.
    known = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int1": torch.int8}
    assert kind.operand == known.get(name, torch.float16)
    bytes_of = {"fp8": (448, 3, 2**-9), "mxfp8": (448, 3, 2**-9), "int8": (127, 0, 1)}
    found = kind.element_type
    assert bytes_of.get(name) == (found and (found.top, found.mantissa, found.step))


def test_a_formats_element_may_be_chosen() -> None:
    wide = formats.get("fp8:element=e5m2")
    assert wide.operand == torch.float8_e5m2
    assert wide.element_type is not None
    # OFP8: E5M2 has two bits of mantissa, its least subnormal is 2^-16.
    assert (wide.element_type.mantissa, wide.element_type.step) == (2, 2**-16)
    with pytest.raises(AttributeError, match="no format says colour"):
        formats.literal("int4", "colour")


@pytest.mark.parametrize(
    "spec",
    [
        *formats.names(),
        "fp8:element=e5m2",
        "fp8:scale=float16",
        "fp8:element=e5m2,scale=float16",
        "mxfp8:element=e5m2",
        "int4:group_size=32",
        "int4:zero_point=true",
        "int4:group_size=1024,zero_point=true",
        "int2:group_size=256",
        "nf4:group_size=128",
    ],
)
def test_a_spec_is_read_and_written(spec: str) -> None:
    assert str(formats.get(spec)) == spec
    assert formats.get(spec) == formats.get(f" {spec}\n")


def test_defaults_are_not_written_and_order_does_not_matter() -> None:
    assert str(formats.get("int4:zero_point=false,group_size=128")) == "int4"
    assert str(formats.get("fp8:scale=float32,element=e4m3")) == "fp8"
    assert str(formats.get("int4:zero_point=true,group_size=64")) == (
        "int4:group_size=64,zero_point=true"
    )
    assert formats.get("nf4:group_size=64") == formats.get("nf4") != formats.get("int4")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("int3", f"unknown format 'int3'; known: {', '.join(formats.names())}"),
        ("", f"unknown format ''; known: {', '.join(formats.names())}"),
        # A file of the folder that is no format, another case, another line.
        ("base", f"unknown format 'base'; known: {', '.join(formats.names())}"),
        ("_shared", f"unknown format '_shared'; known: {', '.join(formats.names())}"),
        ("INT4", f"unknown format 'INT4'; known: {', '.join(formats.names())}"),
        ("int4\nx", f"unknown format 'int4\\nx'; known: {', '.join(formats.names())}"),
        ("x" * 999, f"unknown format '{'x' * 40}'; known: {', '.join(formats.names())}"),
        (
            "int4:a=1",
            "format int4 has no parameter 'a'; its parameters: group_size, zero_point, search",
        ),
        ("mxfp4:block=16", "format mxfp4 has no parameter 'block'; it has none"),
        ("int4:group_size=96", "group_size 96 is not a power of two from 32 to 1024"),
        ("int2:group_size=16", "group_size 16 is not a power of two from 32 to 1024"),
        ("nf4:group_size=2048", "group_size 2048 is not a power of two from 32 to 1024"),
        ("nf4:group_size=0", "group_size 0 is not a power of two from 32 to 1024"),
        ("int4:group_size", "int4: group_size '' is not a whole number"),
        ("int4:group_size=-64", "int4: group_size '-64' is not a whole number"),
        ("int4:group_size=6e1", "int4: group_size '6e1' is not a whole number"),
        ("int4:group_size=６４", "int4: group_size '６４' is not a whole number"),
        (f"int4:group_size={'9' * 999}", f"int4: group_size '{'9' * 40}' is not a whole number"),
        ("int4:zero_point=1", "int4: zero_point '1' is not true or false"),
        (
            "int4:group_size=64,group_size=32",
            "format int4: group_size is given twice; give it once",
        ),
        ("fp8:element=e3m4", "fp8: element 'e3m4' is not one of e4m3, e5m2"),
        ("fp8:scale=bfloat16", "fp8: scale 'bfloat16' is not one of float32, float16"),
        ("mxfp8:element=e2m1", "mxfp8: element 'e2m1' is not one of e4m3, e5m2"),
    ],
)
def test_a_bad_spec_is_one_clear_line(spec: str, line: str) -> None:
    with pytest.raises(FormatError) as error:
        formats.get(spec)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("fp16", 16),
        ("fp8", 8 + 32 / 8192),
        ("fp8:scale=float16", 8 + 16 / 8192),
        ("int1", 1 + 16 / 8192),
        ("int2", 2 + 16 / 128),
        ("int4", 4 + 16 / 128),
        ("int4:zero_point=true", 4 + 24 / 128),
        ("int8", 8 + 32 / 8192),
        ("mxfp4", 4 + 8 / 32),
        ("mxfp8", 8 + 8 / 32),
        ("nf4", 4 + 16 / 64),
    ],
)
def test_bits_a_weight_for_llamas_k(spec: str, bits: float) -> None:
    assert formats.get(spec).bits_per_weight(8192) == bits


@pytest.mark.parametrize(
    ("spec", "columns", "size"),
    [
        # 64 whole groups and one of 8; 2 and one of 44; 1 and one of 1.
        ("int4", 8200, 4100 + 65 * 2),
        ("int4:zero_point=true", 300, 150 + 3 * 3),
        ("nf4", 65, 33 + 2 * 2),
        ("mxfp4", 33, 17 + 2),
        ("mxfp8", 31, 31 + 1),
        ("int2", 129, 33 + 2 * 2),
        # One scale a row, however long it is.
        ("int1", 13, 2 + 2),
        ("fp8", 77, 77 + 4),
        ("fp16", 77, 2 * 77),
    ],
)
def test_a_row_whose_last_group_is_shorter(spec: str, columns: int, size: int) -> None:
    kind = formats.get(spec)
    assert kind.row_bytes(columns) == size
    assert kind.bits_per_weight(columns) == 8 * size / columns
    found = kind.quantise(torch.ones(1, columns))
    beside = sum(part.nbytes for part in (found.scales, found.zeros) if part is not None)
    assert -(-kind.bits * columns // 8) + beside == size


@pytest.mark.parametrize("spec", NUMBERS)
@pytest.mark.parametrize("columns", [1, 50, 384, 650])
def test_dequantised_is_number_minus_zero_times_scale(spec: str, columns: int) -> None:
    kind = formats.get(spec)
    random = np.random.default_rng(columns)
    numbers = NUMBERS[spec]
    codes = random.integers(len(numbers), size=(7, columns), dtype=np.uint8)
    size = kind.group or columns
    scales = random.normal(size=(7, -(-columns // size))).astype(np.float32)
    if spec.startswith("mx"):
        stored = random.integers(60, 200, size=scales.shape, dtype=np.uint8)
        scales = 2.0 ** (stored.astype(np.float32) - 127)
    elif spec in ("fp8", "fp8:element=e5m2", "int8"):
        stored = scales
    else:
        stored = scales.astype(np.float16)
        scales = stored.astype(np.float32)
    zeros = random.integers(16, size=scales.shape, dtype=np.uint8) if kind.has_zeros else None
    groups = np.arange(columns) // size
    expected = numbers[codes]
    if zeros is not None:
        expected = expected - zeros[:, groups]
    expected = expected * scales[:, groups]
    # What `unpack` returns runs along the rows in memory; a kernel's codes run along the columns.
    for order in (np.ascontiguousarray, np.asfortranarray):
        matrix = Quantised(
            torch.from_numpy(order(codes)),
            torch.from_numpy(stored),
            None if zeros is None else torch.from_numpy(zeros),
        )
        np.testing.assert_array_equal(kind.dequantise(matrix).numpy(), expected)
        np.testing.assert_array_equal(matrix.codes.numpy(), codes)


@pytest.mark.parametrize("spec", NUMBERS)
def test_decoded_numbers_keep_the_memory_order_of_codes(spec: str) -> None:
    codes = torch.zeros(5, 33, dtype=torch.uint8)
    for ordered in (codes, codes.t().contiguous().t()):
        assert formats.get(spec).decode(ordered).stride() == ordered.stride()


def test_integer_formats_give_the_integers_that_they_decode_to() -> None:
    for name in formats.names():
        kind = formats.get(name)
        assert kind.is_integer == (name in ("int1", "int8"))
        codes = torch.arange(1 << kind.bits).to(torch.uint8 if kind.bits <= 8 else torch.int16)
        if kind.is_integer:
            found = kind.integers(codes)
            assert found.dtype == torch.int8
            assert found.tolist() == NUMBERS[name].tolist()
        else:
            with pytest.raises(NotImplementedError, match=f"^{name} is no integer format$"):
                kind.integers(codes)


@pytest.mark.parametrize("spec", ["int1", "int2", "int4", "int4:zero_point=true", "nf4",
                                  "fp8:scale=float16"])  # fmt: skip
def test_what_a_float16_scale_cannot_hold_is_refused(spec: str) -> None:
    kind = formats.get(spec)
    # float16 values always fit, the largest too.
    largest = torch.full((3, 65), 65504.0)
    largest[:, ::2] *= -1
    assert kind.dequantise(kind.quantise(largest)).isfinite().all()
    with pytest.raises(FormatError, match=r"^a scale beyond 65504 does not fit into float16$"):
        kind.quantise(largest * 1000)


ERF = np.vectorize(math.erf)


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    """Weights as they are modelled; a deviation that is a power of two changes no MX block."""
    return np.random.default_rng(0).standard_normal((512, 8192), dtype=np.float32) / 128


def normal_noise(count: int, levels: Callable[[float], np.ndarray]) -> float:
    """Mean squared error of nearest of `levels`(absmax), for groups of `count` standard normals.

    No number is quantised: both integrals, over the group's absmax and over the values below it,
    are those of the normal distribution.
    """
    grid = np.linspace(0, 8, 401)
    # The distribution function of absmax is that of one magnitude, erf(m / √2), to the count.
    shares = np.diff(ERF(grid / math.sqrt(2)) ** count)
    total = 0.0
    for most, share in zip((grid[1:] + grid[:-1]) / 2, shares, strict=True):
        if share > 1e-12:
            numbers = np.sort(levels(most))
            edges = (numbers[1:] + numbers[:-1]) / 2
            edges = np.array([-most, *edges.clip(-most, most), most])
            below = ERF(edges / math.sqrt(2)) / 2
            density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
            # ∫ (x − l)² φ(x) dx from edge to edge.
            errors = np.diff(below) * (1 + numbers**2)
            errors += np.diff(density) * 2 * numbers - np.diff(edges * density)
            others = errors.sum() / (below[-1] - below[0])
            ends = [np.square(numbers - end).min() for end in (-most, most)]
            total += share * ((count - 1) * others + np.mean(ends)) / count
    return total


def mx_levels(elements: np.ndarray, exponent: int) -> Callable[[float], np.ndarray]:
    numbers = elements[np.isfinite(elements)].astype(float)
    return lambda most: numbers * 2.0 ** (math.floor(math.log2(most)) - exponent)


def row_levels(elements: np.ndarray, top: float) -> Callable[[float], np.ndarray]:
    numbers = elements[np.isfinite(elements)].astype(float)
    return lambda most: numbers * most / top


# dB on normal values that the definitions imply.
SQNR = {
    spec: -10 * math.log10(noise)
    for spec, noise in {
        "fp8": normal_noise(8192, row_levels(E4M3, 448)),
        "fp8:element=e5m2": normal_noise(8192, row_levels(E5M2, 57344)),
        # A sign keeps E|x| = √(2/π).
        "int1": 1 - 2 / math.pi,
        # Max 1960, table II.
        "int2": 0.1188,
        "int4": normal_noise(128, row_levels(np.arange(-8, 8), 7.5)),
        "int4:group_size=1024": normal_noise(1024, row_levels(np.arange(-8, 8), 7.5)),
        "int8": normal_noise(8192, row_levels(np.arange(-127, 128), 127)),
        "mxfp4": normal_noise(32, mx_levels(E2M1, 2)),
        "mxfp8": normal_noise(32, mx_levels(E4M3, 8)),
        "mxfp8:element=e5m2": normal_noise(32, mx_levels(E5M2, 15)),
        "nf4": normal_noise(64, row_levels(np.array(NORMAL_FLOAT), 1)),
    }.items()
}
# Steps of (max − min) / 15, which are below those of absmax / 7.5.
FLOORS = {"int4:zero_point=true": SQNR["int4"]}


@pytest.mark.parametrize("spec", [*SQNR, *FLOORS])
def test_noise_on_normal_weights(spec: str, gaussian: np.ndarray) -> None:
    kind = formats.get(spec)
    found = kind.dequantise(kind.quantise(torch.from_numpy(gaussian))).numpy()
    noise = np.square(gaussian - found, dtype=np.float64).sum()
    sqnr = 10 * math.log10(np.square(gaussian, dtype=np.float64).sum() / noise)
    if spec in FLOORS:
        assert sqnr > FLOORS[spec]
    else:
        # Max knew the deviation; int2 fits its step to each group's own, which gains a little.
        assert sqnr == pytest.approx(SQNR[spec], abs=0.1 if spec == "int2" else 0.03)


@pytest.mark.parametrize(("name", "gain_db"), [("int4", 1.0), ("nf4", 0.5)])
def test_a_searched_scale_loses_less(name: str, gain_db: float) -> None:
    """Least squares over a few starts, never worse than the absmax's; odd groups and zeros too."""
    values = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    values[3, :130] = 0
    lost = {}
    for spec in (name, f"{name}:search=true"):
        kind = formats.get(spec)
        assert str(kind) == spec
        quantised = kind.quantise(values)
        assert quantised.scales is not None
        assert quantised.scales.isfinite().all()
        lost[spec] = float((kind.dequantise(quantised) - values).square().sum())
    assert 10 * math.log10(lost[name] / lost[f"{name}:search=true"]) > gain_db
    assert not formats.get(f"{name}:search=true").dequantise(quantised)[3, :128].any()
