"""The server's page in a real Chromium: what a visitor types, sees and stops.

Run by `make test-browser`, which installs Playwright's Python part and uses the system's Chromium; skipped without
them. Pictures of the page go to the folder that $PAGE_PICTURES names, to be looked at.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exits import write_exits
from served import Served, config_of, served

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

NARROW = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    exits = write_exits(config_of(folder, folder).model.path, folder / "exits", exit_layers=[3, 6, 9], init="copy")
    with served(config_of(exits, folder)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server: Served, browser: Any) -> Iterator[Any]:
    """The page, loaded; errors of its script, and what its policy blocks, fail the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if "Content Security" in message.text else None)
    page.goto(server.url)
    page.locator("#model", has_text="layers").wait_for()
    yield page
    page.close()
    assert not said, said


def test_a_prompt_is_streamed_in_colours_beside_full_depth(server: Served, page: Any):
    """Tokens without their layer's colour, another text than the server's own, figures that never come."""
    assert page.inner_text("#model") == "tiny-python-llama: 12 layers, exits after 3, 6, 9"
    page.fill("#text", "import os\n")
    page.fill("#tokens", "24")
    page.locator("#threshold").fill("0.3")
    page.press("#text", "Control+Enter")
    _finished(page, 24)
    asked = {"max_new_tokens": 24, "temperature": 0.0}
    [full] = server.reference.generate(["import os\n"], policy="full", **asked)
    [early] = server.reference.generate(["import os\n"], policy="threshold", threshold=0.3, **asked)
    assert page.text_content("#full") == full.text and page.text_content("#early") == early.text
    assert page.locator("#full .early").count() == 0 and page.locator("#early .early").count() > 0
    title = page.locator("#early .early").first.get_attribute("title")
    assert re.fullmatch(r"layer (3|6|9) of 12, confidence [01]\.\d{3}", title)
    colours = {page.evaluate("e => getComputedStyle(e).backgroundColor", mark) for mark in _marks(page)}
    assert len(colours) == 4, "layers that can not be told apart"
    depth = sum(early.exit_layers) / len(early.exit_layers)
    assert f"mean depth {depth:.1f} of 12" in page.inner_text("#early-figures")
    _picture(page, "prompt")


def test_a_chat_uses_the_template_and_a_refusal_is_shown(page: Any):
    """A chat that is sent as a prompt, an error that only the console has, a page that stays stuck behind it."""
    page.check("input[value=chat]")
    page.fill("#text", "x" * 2000)
    page.fill("#tokens", "8")
    page.click("#run")
    page.wait_for_selector("#error:not([hidden])")
    assert "shorter than the model's context" in page.inner_text("#error")
    assert page.inner_text("#early-figures") == "–", "a refused request that still waits"
    _picture(page, "refused")
    page.fill("#text", "hello")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("#run")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "hello"}]
    _finished(page, 8)
    assert page.is_hidden("#error")


def test_escape_stops_a_stream_and_frees_its_memory(server: Served, page: Any):
    """A stream that goes on behind the visitor's back, buttons that stay off."""
    page.fill("#tokens", "800")
    page.click("#run")
    page.wait_for_selector("#early .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("#run:not([disabled])")
    assert page.is_disabled("#stop") and page.text_content("#full") == ""
    page.wait_for_timeout(500)
    assert server.service.client.num_unfinished == 0


def test_the_page_fits_a_telephone_and_the_keyboard(server: Served, browser: Any):
    """Content beside the screen, a field that the Tab key never reaches."""
    page = browser.new_page(viewport=NARROW)
    page.goto(server.url)
    page.locator("#model", has_text="layers").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"text", "policy", "threshold", "tokens", "temperature", "key", "run", "early", "full"} <= reached
    _picture(page, "narrow")
    page.close()


def _marks(page: Any) -> list[Any]:
    return list(page.locator("#legend span").element_handles())


def _finished(page: Any, tokens: int) -> None:
    """Both streams have ended."""
    page.wait_for_selector("#run:not([disabled])", timeout=60_000)
    for name in ("early", "full"):
        assert page.inner_text(f"#{name}-figures").startswith(f"{tokens} tokens"), page.inner_text(f"#{name}-figures")


def _picture(page: Any, name: str) -> None:
    if folder := os.environ.get("PAGE_PICTURES"):
        page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)
