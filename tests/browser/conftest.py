"""A headless Chromium, for tests of pages; where there is none, they are skipped and say so."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The browser; it logs what a page says on its console and asks of a network."""
    binaries = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in binaries:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("no selenium: pip install 'memladder[dev]'")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(binaries[0])
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(tmp_path_factory.mktemp("saved"))}
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(binaries[1])))
    yield browser
    browser.quit()


@pytest.fixture
def opened(driver: Any) -> Iterator[Callable[..., Any]]:
    """`opened(path)` shows a page and waits until all of it is drawn; `dark` and `width` are asked
    of the browser. Afterwards its console must be empty, and no request may have been made."""

    def show(path: Path, *, dark: bool = False, width: int = 1280) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.as_uri())
        ready = "return document.documentElement.dataset.ready === 'yes'"
        WebDriverWait(driver, 30).until(lambda one: one.execute_script(ready))
        return driver

    driver.get_log("performance")
    yield show
    assert driver.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    addresses = [
        one["params"]["request"]["url"]
        for one in asked
        if one["method"] == "Network.requestWillBeSent"
    ]
    assert [a for a in addresses if not a.startswith(("file:", "data:", "blob:"))] == []
