"""The report as Chromium shows it, headless: at two widths, by keyboard, offline. Skipped where no Chromium is installed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intra.evaluation import report
from tests.evaluation.test_report import contents

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
KEYS = {"Tab": 9, "Enter": 13, "ArrowDown": 40}


class Browser:
    """Chromium's DevTools protocol over a pipe: JSON messages that end with a zero byte."""

    def __init__(self, folder: Path) -> None:
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        # The protocol wants descriptors 3 and 4: first out of their way.
        high = [fcntl.fcntl(number, fcntl.F_DUPFD, 20) for number in (theirs, answers)]
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
            f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}', str(CHROMIUM), *options]
        self.process = subprocess.Popen(command, pass_fds=high, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for number in (theirs, answers, *high):
            os.close(number)
        self._rest, self._number, self.events = b"", 0, list[dict[str, Any]]()
        self._session: str | None = None
        (page,) = [one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return dict(found["result"])
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "Chromium ended"
            self._rest += part
        one, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(one))

    def open(self, file: Path, width: int, height: int) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.events.clear()
        self("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)

    def screenshot(self, file: Path) -> bytes:
        height = min(self.value("document.documentElement.scrollHeight"), 12000)
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        data = base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
        file.write_bytes(data)
        return data

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report.html(contents()), encoding="utf-8")
    return file


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 740)])
def test_it_fits_the_screen_and_loads_nothing(browser: Browser, page: Path, tmp_path: Path, width: int, height: int) -> None:
    browser.open(page, width, height)
    assert browser.value("document.documentElement.scrollWidth") <= width  # the page itself never scrolls sideways; its tables do
    asked = [event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]
    assert not [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    # No text of a figure is cut off, in the font that is really there.
    assert browser.value("document.querySelectorAll('figure svg').length") == 10
    cut = """[...document.querySelectorAll('figure svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBBox(), view = svg.viewBox.baseVal;
        return box.x < -1 || box.x + box.width > view.width + 1 || box.y < -1 || box.y + box.height > view.height + 2;
    }).map(text => svg.getAttribute('aria-label') + ': ' + text.textContent))"""
    assert browser.value(cut) == []
    browser.value("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert len(browser.screenshot(tmp_path / "page.png")) > 20_000


def test_it_is_read_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 700)
    browser.press("Tab")
    assert browser.value("document.activeElement.textContent") == "Skip to the results"
    assert browser.value("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Enter")
    assert browser.value("location.hash") == "#results"
    seen = []
    for _ in range(60):
        browser.press("Tab")
        seen.append(browser.value("document.activeElement.id || document.activeElement.tagName"))
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none", seen
        if seen[-1] == "k-all":
            break
    assert seen[-1] == "k-all", seen
    shown = "[...document.querySelectorAll('.q')].filter(item => item.checkVisibility()).length"
    assert browser.value(shown) == 7
    kinds = browser.value("[...document.getElementsByName('kind')].map(item => item.id)")
    assert len(kinds) >= 3
    for kind in kinds[1:]:
        browser.press("ArrowDown")
        assert browser.value("document.activeElement.id") == kind
        assert f"({browser.value(shown)})" in browser.value("document.activeElement.parentElement.textContent")
    browser.value("document.getElementById('k-all').click()")
    browser.value("document.querySelector('.q summary').focus()")
    browser.press("Enter")
    assert browser.value("document.querySelector('.q .passages').getBoundingClientRect().height") > 0
    assert browser.value("document.querySelector('.q .passages .gold .hit').textContent").startswith("★ gold 1 of ")


def test_benchmarks_are_filtered_too(browser: Browser, page: Path) -> None:
    browser.open(page, 900, 700)
    browser.value("document.getElementById('b-2').click()")
    shown = "[...document.querySelectorAll('.q')].filter(item => item.checkVisibility()).map(item => item.className.split(' ')[1])"
    assert browser.value(shown) == ["b2"] * 3
