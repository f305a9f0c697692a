"""Tests of this folder need an NVIDIA GPU and are skipped where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from memladder.core import devices
from memladder.core.errors import DeviceError


@pytest.fixture(scope="session", autouse=True)
def device() -> devices.Device:
    try:
        found = devices.device("cuda:0")
    except DeviceError as error:
        pytest.skip(str(error))
    assert found is not None
    return found


def comes_true(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until something holds; whether it did in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
