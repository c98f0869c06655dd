"""The page of `explain` in headless Chromium: it loads without an error, and its filters work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trt_dynamo
from tests.test_explanation import HOSTILE, Model, cut
from trt_dynamo.explanation import Explanation

pytestmark = pytest.mark.browser

SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1400,1200",
)  # fmt: skip

Opened = Callable[[Explanation], Any]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    import shutil

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def opened(driver: Any, tmp_path: Path) -> Iterator[Opened]:
    """Opens the page of an explanation; whatever the browser complains of fails the test."""

    def open(found: Explanation, title: str = "A model") -> Any:
        driver.get(found.html(tmp_path / "page.html", title).as_uri())
        return driver

    yield open
    assert driver.get_log("browser") == []


def texts(driver: Any, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]


def rows(driver: Any) -> int:
    return len(driver.find_elements("css selector", "#nodes tbody tr"))


def type_in(driver: Any, text: str) -> None:
    box = driver.find_element("id", "filter")
    box.clear()
    box.send_keys(text)


def test_it_shows_modules_engines_and_nodes(opened: Opened) -> None:
    found = cut()
    driver = opened(found)
    assert texts(driver, "#summary") == [
        f"{found.converted} of {len(found.nodes)} nodes in 3 TensorRT engines, from 1 graph"
    ]
    assert rows(driver) == len(found.nodes)
    assert texts(driver, ".card strong") == ["segment_0", "segment_1", "segment_2"]
    assert texts(driver, "#tree .name")[:2] == ["the model", "blocks"]
    why = driver.find_element("css selector", "tr[title='the setting eager_ops'] .why")
    assert why.text == "the setting eager_ops"


def test_the_filter(opened: Opened) -> None:
    found = cut()
    driver = opened(found)
    type_in(driver, "aten.tanh blocks.1")
    assert rows(driver) == 1
    assert texts(driver, "#found") == [f"1 of {len(found.nodes)} nodes"]
    type_in(driver, "eager_ops")
    assert rows(driver) == 2
    type_in(driver, "nothing is called so")
    assert (rows(driver), texts(driver, "#tree .name")) == (0, [])
    driver.find_element("id", "clear").click()
    assert rows(driver) == len(found.nodes)


def test_a_module_and_an_engine_can_be_picked(opened: Opened) -> None:
    found = cut()
    driver = opened(found)
    button = driver.find_element("css selector", "button[data-engine='segment_1']")
    button.click()
    assert rows(driver) == len(found.engines[1].nodes)
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    type_in(driver, "linear")
    shown = {n.name for n in found.nodes if any(kind == "Linear" for _, kind in n.modules)}
    assert rows(driver) == len(shown)
    driver.find_element("css selector", ".module[data-path='blocks.0.up']").click()
    assert rows(driver) == sum(("blocks.0.up", "Linear") in node.modules for node in found.nodes)


def test_the_largest_layers(opened: Opened) -> None:
    driver = opened(cut())
    assert texts(driver, "#largest tbody td:first-child")[0] == "blocks.0.up"
    driver.find_element("id", "order").click()
    assert texts(driver, "#order") == ["by their weights"]


def test_a_hostile_text_stays_text(opened: Opened) -> None:
    driver = opened(Explanation((), 0, (), 1, breaks=(HOSTILE,)), HOSTILE)  # type: ignore[call-arg]
    assert "alert(1)" in texts(driver, "h1")[0]
    assert "alert(1)" in texts(driver, ".notes")[0]


def test_nothing_in_tensorrt(opened: Opened) -> None:
    torch._dynamo.reset()
    driver = opened(trt_dynamo.explain(Model().eval(), torch.randn(3, 8), options={"min_segment_nodes": 1000}))
    assert texts(driver, "#engines") == ["none"]
    assert rows(driver) > 5
