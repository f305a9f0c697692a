"""Which cut is taken: the first, unless another one was kept for this GPU and version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memladder.core import digests
from memladder.core.errors import CacheError
from memladder.kernels.cuda import tuning


@pytest.fixture(autouse=True)
def _as_shipped() -> Iterator[None]:
    kept = tuning.preferred()
    yield
    tuning.prefer(kept)


def test_the_first_is_the_default_and_a_kept_one_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "tuning" / "gpu.json"
    assert not tuning.load(file)
    assert tuning.choice("kernel", "few", [(64, 2), (32, 4)]) == (64, 2)
    assert tuning.asked()["kernel few"] == ("(64, 2)", "(32, 4)")
    tuning.prefer({"kernel few": "(32, 4)"})
    tuning.save(file)
    tuning.prefer({})
    assert tuning.choice("kernel", "few", [(64, 2), (32, 4)]) == (64, 2)
    assert tuning.load(file)
    assert tuning.choice("kernel", "few", [(64, 2), (32, 4)]) == (32, 4)
    assert tuning.choice("kernel", "many", [(64, 2), (32, 4)]) == (64, 2)
    # A candidate that no longer exists is none.
    assert tuning.choice("kernel", "few", [(64, 2)]) == (64, 2)


@pytest.mark.parametrize("text", ["{", "[]", '{"kernel few": 1}', "\x80"])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tuning" / "gpu.json"
    tuning.prefer({})
    tuning.save(file)
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match="SHA-256 differs; `memladder tune` makes it anew"):
        tuning.load(file)
    digests.note(file, digests.of(file))
    with pytest.raises(CacheError, match="`memladder tune` makes it anew"):
        tuning.load(file)
