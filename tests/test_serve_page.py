"""The page in a real browser: against a server that does as a test says, and against the real one."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

PAGE = Path(__file__).parents[1] / "python" / "fastdllm_ext" / "serve" / "page.html"
SECONDS = 20  # that the page is given for anything
Json = dict[str, Any]

try:
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Chrome
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    MISSING = "selenium is not installed (pip install selenium)"
else:
    programs = shutil.which("chromium") and shutil.which("chromedriver")
    MISSING = "" if programs else "chromium and chromedriver are not installed (Debian: chromium-driver)"
if MISSING and os.environ.get("FASTDLLM_BROWSER") == "required":
    raise RuntimeError(f"FASTDLLM_BROWSER=required: {MISSING}")
if MISSING:
    pytest.skip(f"{MISSING}; FASTDLLM_BROWSER=required makes this a failure", allow_module_level=True)


# A server that does as it is told.

MODEL: Json = {
    "id": "model-of-the-test",
    "object": "model",
    "fastdllm": {
        "max_positions": 2048,
        "max_tokens_default": 12,
        "family": "llada",
        "settings": {"block_length": 4},
        "takes_top_p": False,
        "has_chat": False,
        "parameters": 1_234_567,
    },
}
# Step by step: (position, token, confidence). Three blocks of four; the text ends at position 9.
STEPS = [
    [(0, "Grüße", 0.97), (2, "\n", 0.4)],
    [(1, " 🎈", 0.65), (3, "<b>x</b>", 0.8)],
    [(4, "&amp;", 0.995), (5, "\n", 1.0), (6, " six", 0.91), (7, "7", 0.2)],
    [(9, "<|endoftext|>", 0.99), (10, "<|endoftext|>", 0.95)],
    [(8, "!", 0.9), (11, "tail", 0.3)],
]
TEXT = "Grüße 🎈\n<b>x</b>&amp;\n six7!"
TOKENS = 10


class Sender(BaseHTTPRequestHandler):
    """Answers the page; what it does with a prompt is the server's next script."""

    protocol_version = "HTTP/1.1"
    server: Fake

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, value: Json, **headers: str) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), **headers)

    def complain(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        error = {"message": message, "type": "", "param": param, "code": None}
        self.reply(status, {"error": error}, **headers)

    def open_stream(self) -> None:
        self._head(200, Content_Type="text/event-stream", Transfer_Encoding="chunked")

    def send_bytes(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def send_events(self, *events: Json | str) -> None:
        for event in events:
            self.send_bytes(encoded(event))

    def end_stream(self) -> None:
        self.send_bytes(b"")

    def cut(self) -> None:
        """Ends the connection within a stream."""
        self.close_connection = True

    def _send(self, status: int, kind: str, content: bytes, **headers: str) -> None:
        self._head(status, Content_Type=kind, Content_Length=str(len(content)), **headers)
        self.wfile.write(content)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        if self.path == "/":
            page = PAGE.read_bytes()
            self._send(200, "text/html", page, Content_Security_Policy=policy_of(page.decode()))
        elif self.path == "/health":
            status, value = self.server.health.popleft() if self.server.health else (200, {"status": "ok"})
            self.reply(status, value)
        elif self.path == "/v1/models" and self.may_pass():
            self.reply(200, {"object": "list", "data": [self.server.model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.may_pass():
            self.server.asked.append((self.path, body))
            script = self.server.scripts.popleft() if self.server.scripts else tell(STEPS)
            script(self)

    def may_pass(self) -> bool:
        passes = self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"
        if not passes:
            self.complain(401, "the request has no API key")
        return passes


class Fake(ThreadingHTTPServer):
    """The scripted server. ``asked``: path and body of each prompt that came through."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Sender)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.model = json.loads(json.dumps(MODEL))
        self.key: str | None = None
        self.health: deque[tuple[int, Json]] = deque()
        self.scripts: deque[Callable[[Sender], None]] = deque()
        self.asked: list[tuple[str, Json]] = []


def policy_of(page: str) -> str:
    """The strictest policy under which the page can work."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; base-uri 'none'; form-action 'none'"
    )


def encoded(event: Json | str, end: str = "\n") -> bytes:
    """An event as it is sent; JSON in two lines of data, the first of which holds its brace alone."""
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    lines = data if isinstance(event, str) else f"{data[0]}{end}data: {data[1:]}"
    return f"data: {lines}{end}{end}".encode()


def opening(length: int = 12, block: int = 4) -> Json:
    facts = {"prompt_tokens": 3, "gen_length": length, "block_length": block, "settings": {}}
    return {"choices": [{"index": 0, "text": "", "finish_reason": None}], "fastdllm": facts}


def step(number: int, commits: list[tuple[int, str, float]], second: float = 0.5) -> Json:
    """The chunk of a step; step i ends i + 1 times ``second`` after the start."""
    names = ("position", "token", "confidence")
    made = [{**dict(zip(names, one, strict=True)), "token_id": 7, "step": number} for one in commits]
    choice = {"index": 0, "text": "", "finish_reason": None, "commits": made}
    return {"choices": [choice], "fastdllm": {"nfe": number + 1, "seconds": (number + 1) * second}}


def closing(
    text: str, tokens: int, nfe: int, second: float = 0.5, reason: str = "stop", chat: bool = False
) -> Json:
    """The chunk that ends an answer."""
    answer = {"delta": {"content": text}} if chat else {"text": text}
    facts = {
        "nfe": nfe,
        "seconds": nfe * second,
        "tokens": tokens,
        "tokens_per_forward": tokens / nfe,
        "tokens_per_second": tokens / nfe / second,
        "queue_seconds": 0.0,
        "first_block_seconds": second,
    }
    return {"choices": [{"index": 0, **answer, "finish_reason": reason}], "fastdllm": facts}


def tell(
    steps: list[list[tuple[int, str, float]]],
    gate: Callable[[int], object] = lambda number: None,
    second: float = 0.5,
    text: str = TEXT,
    tokens: int = TOKENS,
    chat: bool = False,
) -> Callable[[Sender], None]:
    """A script: the steps one after another, ``gate(i)`` before step i and before the end."""

    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening())
        for number, commits in enumerate(steps):
            gate(number)
            sender.send_events(step(number, commits, second))
        gate(len(steps))
        sender.send_events(closing(text, tokens, len(steps), second, chat=chat), "[DONE]")
        sender.end_stream()

    return script


def one_by_one(steps: list[list[tuple[int, str, float]]]) -> list[list[tuple[int, str, float]]]:
    """The same commits, one a step."""
    return [[commit] for commits in steps for commit in commits]


class Gates:
    """Lets a script go on one step at a time."""

    def __init__(self) -> None:
        self._tickets = threading.Semaphore(0)

    def __call__(self, number: int) -> None:
        assert self._tickets.acquire(timeout=SECONDS)

    def open(self, steps: int = 1) -> None:
        self._tickets.release(steps)


# The browser, and the page in it.


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(chrome: Chrome, fake: Fake) -> Iterator[Page]:
    yield from watched(chrome, fake.url)


def watched(chrome: Chrome, url: str) -> Iterator[Page]:
    """The page of a server; in the end there must be no error of its own and no request to another."""
    page = Page(chrome, url)
    page.look()
    chrome.get_log("browser")
    chrome.get_log("performance")
    yield page
    errors = [entry for entry in chrome.get_log("browser") if entry["source"] != "network"]
    assert not errors, errors
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert sent
    assert {urlsplit(one).netloc for one in sent} == {urlsplit(url).netloc}
    chrome.get("about:blank")


class Page:
    """What a reader does with the page, and sees of it."""

    def __init__(self, chrome: Chrome, url: str) -> None:
        self.chrome, self.url = chrome, url

    def look(self, width: int = 1200, height: int = 900, scheme: str = "light", motion: str = "") -> None:
        """The window and what the reader prefers: as little motion as can be, unless said otherwise."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion or "reduce"},
        ]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self) -> Page:
        """Loads the page and waits until it knows the model."""
        self.load()
        self.until(lambda: self.attribute("generate", "aria-disabled") == "false")
        return self

    def load(self) -> None:
        self.chrome.get(self.url)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def find(self, name: str) -> Any:
        return self.chrome.find_element(By.ID, name)

    def click(self, name: str) -> None:
        self.find(name).click()

    def attribute(self, name: str, attribute: str) -> str | None:
        return self.find(name).get_attribute(attribute)

    def text(self, name: str) -> str:
        """What is seen of an element, "" if it is hidden."""
        return self.find(name).text

    def until(self, holds: Callable[[], Any]) -> Any:
        """Waits until something holds, and returns it."""
        end = time.monotonic() + SECONDS
        while not (value := holds()):
            assert time.monotonic() < end, f"{holds.__code__.co_firstlineno}: {self.text('answer')!r}"
            time.sleep(0.01)  # between looks
        return value

    def until_text(self, name: str, words: str) -> None:
        self.until(lambda: words in self.text(name))

    def fill(self, **values: str) -> None:
        """Types into fields, by their ids."""
        for name, value in values.items():
            self.find(name).clear()
            self.find(name).send_keys(value)

    def ask(self, prompt: str = "Speak.") -> None:
        """Types a prompt and sends it."""
        self.fill(prompt=prompt)
        self.click("generate")

    def finish(self) -> None:
        """Waits until nothing goes on any more."""
        self.until(lambda: self.attribute("stop", "aria-disabled") == "true")

    def answer(self, prompt: str = "Speak.") -> None:
        self.ask(prompt)
        self.finish()

    def cells(self, pane: int = 0) -> list[str | None]:
        """The text of each position of a row that is shown; None where a mask is."""
        return self.js(
            """const row = document.querySelectorAll(".row")[arguments[0]];
            return [...row.children].filter((cell) => getComputedStyle(cell).display !== "none")
              .map((cell) => (cell.matches(".mask") ? null : cell.textContent));""",
            pane,
        )

    def row_text(self, pane: int = 0) -> str:
        return "".join(text or "" for text in self.cells(pane))

    def server_text(self) -> str:
        """The answer as the server gave it, under "Text alone"."""
        return self.js("return document.querySelector('pre').textContent")

    def numbers(self, pane: int = 0) -> dict[str, str]:
        return self.js(
            """const numbers = document.querySelectorAll(".numbers")[arguments[0]];
            const texts = (name) => [...numbers.querySelectorAll(name)].map((one) => one.textContent);
            return Object.fromEntries(texts("dt").map((name, i) => [name, texts("dd")[i]]));""",
            pane,
        )

    def styles(self, name: str) -> list[str]:
        """A computed style of each cell that is shown."""
        return self.js(
            """return [...document.querySelectorAll(".row > .cell")]
              .filter((cell) => getComputedStyle(cell).display !== "none")
              .map((cell) => getComputedStyle(cell)[arguments[0]]);""",
            name,
        )

    def press(self, *keys: str, control: bool = False) -> None:
        """Presses keys where the focus is."""
        actions = ActionChains(self.chrome, duration=0)
        if control:
            actions.key_down(Keys.CONTROL)
        for key in keys:
            actions.send_keys(key)
        if control:
            actions.key_up(Keys.CONTROL)
        actions.perform()

    def focused(self) -> str:
        """What has the focus: its id, or its label."""
        return self.js("const at = document.activeElement; return at.id || at.ariaLabel || at.value;")


# Generating.


def test_tokens_appear_step_by_step_and_end_as_the_servers_text(page: Page, fake: Fake) -> None:
    gates = Gates()
    fake.scripts.append(tell(STEPS, gates))
    page.open().ask("Speak.")
    row: list[str | None] = [None] * 12
    for commits in STEPS[:3]:
        gates.open()
        for position, token, _ in commits:
            row[position] = token
        page.until(lambda: page.cells() == row)
    gates.open(3)
    page.finish()
    assert page.row_text() == TEXT
    assert page.numbers() == {
        "NFE": "5", "tokens/forward": "2", "tokens/s": "4", "seconds": "2.50", "first block, s": "0.500",
    }  # fmt: skip
    assert "10 of 12 tokens" in page.text("answer")
    assert page.server_text() == TEXT


def test_numbers_go_along(page: Page, fake: Fake) -> None:
    gates = Gates()
    fake.scripts.append(tell(STEPS, gates))
    page.open().ask()
    gates.open()
    page.until(lambda: page.numbers()["NFE"] == "1")
    assert page.numbers() == {
        "NFE": "1", "tokens/forward": "2", "tokens/s": "4", "seconds": "0.500", "first block, s": "–",
    }  # fmt: skip
    gates.open()
    page.until(lambda: page.numbers()["NFE"] == "2")
    assert page.numbers() == {
        "NFE": "2", "tokens/forward": "2", "tokens/s": "4", "seconds": "1.00", "first block, s": "1.00",
    }  # fmt: skip
    gates.open(4)
    page.finish()


def test_what_lies_behind_the_end_is_faint_and_then_gone(page: Page, fake: Fake) -> None:
    gates = Gates()
    fake.scripts.append(tell(STEPS, gates))
    page.open().ask()
    gates.open(4)
    page.until(lambda: page.numbers()["NFE"] == "4")
    behind = page.js("return [...document.querySelectorAll('.cell.behind')].map((c) => c.ariaLabel)")
    assert [label.split(", ")[1] for label in behind] == ["position 11", "position 12"]
    gates.open(2)
    page.finish()
    assert len(page.cells()) == TOKENS


def test_the_request_says_what_the_form_says(page: Page, fake: Fake) -> None:
    page.open().answer("Speak.")
    path, body = fake.asked[-1]
    assert path == "/v1/completions"
    assert body == {
        "model": "model-of-the-test", "prompt": "Speak.", "max_tokens": 12, "block_length": 4,
        "cache": "dual", "threshold": 0.9, "factor": None, "steps": None, "temperature": 0, "stream": True,
        "stream_mode": "denoise",
    }  # fmt: skip
    page.find("cache").send_keys("none")
    page.find("rule").send_keys("steps")
    page.fill(value="6", max_tokens="8", block_length="2", temperature="0.5", seed="3")
    page.answer("More.")
    assert fake.asked[-1][1] == {
        "model": "model-of-the-test", "prompt": "More.", "max_tokens": 8, "block_length": 2, "cache": "none",
        "threshold": None, "factor": None, "steps": 6, "temperature": 0.5, "seed": 3, "stream": True,
        "stream_mode": "denoise",
    }  # fmt: skip


def test_the_form_begins_with_the_servers_settings(page: Page, fake: Fake) -> None:
    rule = {"name": "klass", "kl": 0.01}
    settings = {"block_length": 8, "cache": "prefix", "temperature": 0.2, "rule": rule}
    fake.model["fastdllm"]["settings"] = settings
    page.open().answer()
    body = fake.asked[-1][1]
    assert {name: body[name] for name in settings} == settings
    assert body["threshold"] is None
    assert page.text("about") == "llada, 1.23M parameters, up to 2048 positions of prompt and answer"


def test_a_model_with_a_chat_template_is_asked_in_messages(page: Page, fake: Fake) -> None:
    fake.model["fastdllm"]["has_chat"] = True
    fake.scripts.extend([tell(STEPS, chat=True), tell(STEPS)])
    page.open().answer("Speak.")
    path, body = fake.asked[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Speak."}]
    assert "prompt" not in body
    assert page.server_text() == TEXT
    page.click("chat")
    page.answer("Speak.")
    assert fake.asked[-1][0] == "/v1/completions"


def test_examples_are_offered_for_the_demo_model_alone(page: Page, fake: Fake) -> None:
    assert page.open().text("examples") == ""
    fake.model["id"] = "fastdllm-demo"
    buttons = page.open().find("examples").find_elements(By.TAG_NAME, "button")
    buttons[-1].click()
    assert page.attribute("prompt", "value") == buttons[-1].text != ""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("part", ["ü", "🎈", "\n"])
def test_the_stream_may_be_cut_anywhere(page: Page, fake: Fake, part: str, end: str) -> None:
    """In a character, and in the end of a line: what is before the cut is read before the rest is sent."""
    gates = Gates()

    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening())
        event = encoded(step(1, [(1, "ü🎈", 0.9)]), end)
        cut = event.index(part.encode() if part != "\n" else end.encode()) + 1
        sender.send_bytes(encoded(step(0, [(0, "ä", 0.9)]), end) + event[:cut])
        gates(0)
        sender.send_bytes(event[cut:] + encoded(closing("äü🎈", 2, 2), end) + encoded("[DONE]", end))
        sender.end_stream()

    fake.scripts.append(script)
    page.open().ask()
    page.until(lambda: page.row_text() == "ä")
    gates.open()
    page.finish()
    assert page.row_text() == "äü🎈"
    assert page.text("problem") == ""


def test_commits_that_a_restart_voids_go(page: Page, fake: Fake) -> None:
    gates = Gates()

    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening(), *(step(i, commits) for i, commits in enumerate(STEPS[:3])))
        gates(0)
        again = step(1, [(1, " again", 0.9)])
        again["choices"][0]["restarted_at"] = 1
        sender.send_events(again)
        gates(1)
        sender.send_events(closing("Grüße again\n", 3, 3), "[DONE]")
        sender.end_stream()

    fake.scripts.append(script)
    page.open().ask()
    page.until(lambda: page.cells()[4] == "&amp;")
    gates.open()
    page.until(lambda: page.cells() == ["Grüße", " again", "\n", *[None] * 9])
    gates.open()
    page.finish()


def test_a_position_that_is_filled_again_holds_the_later_token(page: Page, fake: Fake) -> None:
    steps = [[(0, "a", 0.9), (1, "b", 0.5)], [(1, "c", 0.9)]]
    fake.scripts.append(tell(steps, text="ac", tokens=2))
    page.open().answer()
    assert page.row_text() == "ac"
    page.find("slider").send_keys(Keys.ARROW_LEFT)
    assert page.row_text() == "ab"


def test_a_step_touches_no_more_cells_than_it_changes(page: Page, fake: Fake) -> None:
    """1,024 positions in one block: a step fills one, and the one before is no longer the newest."""
    gates = Gates()

    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening(1024, 1024), *(step(i, [(i, f"t{i}", 0.9)]) for i in range(500)))
        gates(0)
        sender.send_events(step(500, [(500, "new", 0.9)]))
        gates(1)
        sender.send_events(closing("", 1024, 501, reason="length"), "[DONE]")
        sender.end_stream()

    fake.scripts.append(script)
    page.open().ask()
    page.until(lambda: "t499" in page.cells())
    page.js(
        """window.touched = new Set();
        new MutationObserver((seen) => seen.forEach(({target}) => window.touched.add(target)))
          .observe(document.querySelector(".row"), {subtree: true, childList: true, attributes: true});"""
    )
    gates.open()
    page.until(lambda: "new" in page.cells())
    assert page.js("return [...window.touched].map((cell) => cell.textContent).sort()") == ["new", "t499"]
    gates.open()
    page.finish()


# Colours.


def test_colours_and_underlines_tell_confidence_or_step(page: Page, fake: Fake) -> None:
    page.open().answer()
    by_confidence, lines = page.styles("backgroundColor"), page.styles("textDecoration")
    ranks = {0: 3, 1: 1, 2: 0, 3: 2, 4: 4, 5: 4, 6: 3, 7: 0, 8: 3, 9: 4}  # of STEPS' confidences
    for a in ranks:
        for b in ranks:
            assert (by_confidence[a] == by_confidence[b]) == (ranks[a] == ranks[b])
            assert (lines[a] == lines[b]) == (ranks[a] == ranks[b])
    assert "confidence < 0.5 ≥ 0.5 ≥ 0.7 ≥ 0.9 ≥ 0.99" in page.text("answer").replace("\n", " ")
    page.js("document.querySelector('[value=step]').click()")
    by_step = page.styles("backgroundColor")
    steps = {position: number for number, commits in enumerate(STEPS) for position, _, _ in commits}
    for a in range(TOKENS):
        for b in range(TOKENS):
            assert (by_step[a] == by_step[b]) == (steps[a] == steps[b])
    assert "step 1 2 3 4 5" in page.text("answer").replace("\n", " ")


def test_many_steps_share_colours(page: Page, fake: Fake) -> None:
    fake.scripts.append(tell(one_by_one(STEPS)))
    page.open().answer()
    page.js("document.querySelector('[value=step]').click()")
    assert "step 1–3 4–6 7–9 10–12" in page.text("answer").replace("\n", " ")


CONTRASTS = """
  // The least ratio of a text's colour to what is painted behind it, for each element that has text itself.
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((one, i) => one * a + under[i] * (1 - a));
  const light = (one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => element
    ? over(parse(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [255, 255, 255];
  return [...document.querySelectorAll("body *")]
    .filter((one) => one.getClientRects().length && !one.closest("[aria-disabled=true], option"))
    .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((one) => {
      const back = behind(one);
      const [a, b] = [luminance(back), luminance(over(parse(getComputedStyle(one).color), back))];
      return [`${one.tagName} ${one.className} ${one.textContent.slice(0, 30)}`,
        (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
"""


def test_both_themes_are_readable_and_differ(page: Page, fake: Fake) -> None:
    page.open()
    colours = {}
    for scheme in ("light", "dark"):
        page.look(scheme=scheme)
        page.answer()  # with all levels of confidence
        colours[scheme] = page.styles("backgroundColor")
        ratios = page.js(CONTRASTS)
        page.find("slider").send_keys(Keys.HOME, Keys.ARROW_RIGHT)
        page.js("document.querySelector('.cell').dispatchEvent(new Event('pointerover', {bubbles: true}))")
        ratios += page.js(CONTRASTS)
        fake.scripts.append(lambda sender: sender.complain(400, "Not so.", "cache"))
        page.answer()
        ratios += page.js(CONTRASTS)
        assert {f"token level-{level}" for level in range(5)} <= {
            re.search(r"token level-\d", name)[0] for name, _ in ratios if "token level" in name
        }
        assert [one for one in ratios if one[1] < 4.5] == []
    assert not set(colours["light"]) & set(colours["dark"])


# The replay.


def test_the_slider_shows_the_row_after_any_step(page: Page, fake: Fake) -> None:
    page.open().answer()
    slider = page.find("slider")
    slider.send_keys(Keys.HOME)
    assert page.cells() == [None] * 12
    slider.send_keys(Keys.ARROW_RIGHT)
    assert page.cells() == ["Grüße", None, "\n", *[None] * 9]
    assert page.numbers()["seconds"] == "0.500"
    assert slider.get_attribute("aria-valuetext") == page.text("where") == "0.500 s: step 1 of 5"
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert page.row_text() == "Grüße 🎈\n<b>x</b>"
    slider.send_keys(Keys.END)
    assert page.row_text() == TEXT
    assert page.numbers()["tokens/forward"] == "2"


def test_play_and_pause(page: Page, fake: Fake) -> None:
    fake.scripts.append(tell(one_by_one(STEPS), second=1.0))
    page.open().answer()
    page.find("speed").send_keys("10 times slower")
    page.find("play").send_keys(Keys.SPACE)
    assert page.text("play") == "Pause"
    assert page.row_text() == ""  # the first step is ten seconds away
    page.find("play").send_keys(Keys.SPACE)
    page.find("speed").send_keys("4 times faster")
    page.find("slider").send_keys(Keys.END, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.text("play") == "Play"
    assert page.row_text() != TEXT
    page.find("play").send_keys(Keys.SPACE)
    page.until(lambda: page.text("play") == "Play")
    assert page.row_text() == TEXT


def test_what_was_too_fast_to_see_is_replayed_unless_motion_is_unwanted(page: Page, fake: Fake) -> None:
    fake.scripts.extend([tell(STEPS, second=0.01)] * 2)
    page.look(motion="reduce")
    page.open().answer()
    assert page.text("play") == "Play"
    assert set(page.styles("animationName")) == {"none"}
    page.look(motion="no-preference")
    page.answer()
    assert page.text("play") == "Pause"
    assert page.numbers()["NFE"] != "5"
    page.find("speed").send_keys("as recorded")
    page.until(lambda: page.text("play") == "Play")
    assert page.row_text() == TEXT
    assert page.numbers()["NFE"] == "5"


# Side by side.


def test_side_by_side(page: Page, fake: Fake) -> None:
    gates = Gates()
    plain = one_by_one(STEPS)
    fake.scripts.extend([tell(STEPS, gates), tell(plain, gates)])
    page.open()
    page.find("prompt").send_keys("Speak.")
    page.click("compare")
    page.until(lambda: len(fake.asked) == 1)
    page.until_text("answer", "not asked yet")
    assert "one after the other" in page.text("compare-note")
    gates.open(len(STEPS))
    page.until(lambda: page.numbers()["NFE"] == "5")
    assert len(fake.asked) == 1  # the second waits for the first's end
    gates.open(1 + len(plain) + 1)
    page.finish()
    first, second = (body for _, body in fake.asked)
    assert second == {**first, "cache": "none", "threshold": None, "steps": 12}
    assert page.row_text(0) == page.row_text(1) == TEXT
    speedup = page.text("speedup").replace("\n", " ")
    assert "2.4× in seconds: 2.50 instead of 6.00" in speedup
    assert "2.4× in forwards: 5 instead of 12" in speedup
    assert "the same text" in speedup
    # One clock: after 1.5 s one has taken three steps of several tokens, the other three of one.
    slider = page.find("slider")
    slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 6)
    assert page.text("where") == "1.50 s: step 3 of 5; step 3 of 12"
    assert [sum(text is not None for text in page.cells(pane)) for pane in (0, 1)] == [8, 3]


def test_answers_that_differ_are_said_to(page: Page, fake: Fake) -> None:
    fake.scripts.extend([tell(STEPS), tell(STEPS, text="Otherwise.")])
    page.open().find("prompt").send_keys("Speak.")
    page.click("compare")
    page.finish()
    assert "The answers differ" in page.text("speedup")
    page.answer()
    assert page.text("speedup") == ""
    assert len(page.chrome.find_elements(By.CSS_SELECTOR, ".row")) == 1


# What can go wrong.


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request(page: Page, fake: Fake, how: str) -> None:
    gone = threading.Event()

    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening(), step(0, STEPS[0]))
        try:
            while True:
                sender.send_bytes(b": still here\n\n")
        except OSError:
            gone.set()
            sender.close_connection = True

    fake.scripts.append(script)
    page.open().ask()
    page.until(lambda: page.numbers()["NFE"] == "1")
    if how == "button":
        page.click("stop")
    else:
        page.press(Keys.ESCAPE)
    page.finish()
    assert gone.wait(SECONDS)
    assert page.row_text() == "Grüße\n"
    assert "stopped: 2 of 12 positions filled" in page.text("answer")
    assert page.text("problem") == ""


def test_an_error_is_shown_at_its_field_and_as_text(page: Page, fake: Fake) -> None:
    message = "block_length=4: <b>must not</b> be four"
    fake.scripts.append(lambda sender: sender.complain(400, message, "block_length"))
    page.open().answer()
    assert message in page.text("problem")
    assert page.find("problem-text").get_attribute("role") == "alert"
    assert page.attribute("block_length", "aria-invalid") == "true"
    assert page.attribute("block_length", "aria-describedby") == "problem-text"
    page.answer()
    assert page.text("problem") == ""
    assert page.attribute("block_length", "aria-invalid") is None
    assert page.attribute("block_length", "aria-describedby") is None
    assert page.row_text() == TEXT


def test_an_error_without_words_is_given_some(page: Page, fake: Fake) -> None:
    fake.scripts.append(lambda sender: sender.reply(502, {}))
    page.open().answer()
    assert "HTTP 502" in page.text("problem")


def test_an_error_within_a_stream(page: Page, fake: Fake) -> None:
    def script(sender: Sender) -> None:
        sender.open_stream()
        error = {"message": "The logits are NaN.", "param": None}
        sender.send_events(opening(), step(0, STEPS[0]), {"error": error})
        sender.end_stream()

    fake.scripts.append(script)
    page.open().answer()
    assert "The logits are NaN." in page.text("problem")
    assert "incomplete: 2 of 12" in page.text("answer")
    assert page.row_text() == "Grüße\n"


@pytest.mark.parametrize("how", [Sender.cut, Sender.end_stream])
def test_a_connection_that_is_lost(page: Page, fake: Fake, how: Callable[[Sender], None]) -> None:
    gates = Gates()

    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening(), step(0, STEPS[0]))
        gates(0)
        how(sender)

    fake.scripts.append(script)
    page.open().ask()
    page.until(lambda: page.numbers()["NFE"] == "1")
    gates.open()
    page.finish()
    assert "connection was lost" in page.text("problem")
    assert "incomplete: 2 of 12" in page.text("answer")
    assert page.row_text() == "Grüße\n"
    page.click("retry")
    page.until(lambda: page.row_text() == TEXT)
    page.finish()
    assert page.text("problem") == ""
    assert fake.asked[0] == fake.asked[1]


def test_a_server_that_is_gone(page: Page, fake: Fake) -> None:
    page.open()
    fake.shutdown()
    fake.socket.close()
    fake.scripts.extend([Sender.cut] * 9)  # of connections that are open already
    page.answer()
    assert "cannot be reached" in page.text("problem")


def test_a_key_is_asked_for_and_kept_in_the_session_alone(page: Page, fake: Fake) -> None:
    fake.key = "right"
    page.load()
    for key in ("wrong", "right"):
        page.until_text("key", "asks for its key: the request has no API key.")
        assert page.until(lambda: page.focused() == "key-value")
        page.press(key, Keys.ENTER)
    page.until(lambda: page.attribute("generate", "aria-disabled") == "false")
    assert page.text("key") == ""
    assert page.js("return Object.values(sessionStorage)") == ["right"]
    assert page.js("return localStorage.length + document.cookie.length") == 0
    page.answer()
    assert page.row_text() == TEXT
    fake.key = "another"
    page.ask()
    page.until_text("key", "asks for its key: the request has no API key.")
    page.until(lambda: page.focused() == "key-value")
    page.press("another", Keys.ENTER)
    page.finish()
    assert page.row_text() == TEXT


def test_the_question_for_a_key_can_be_stopped(page: Page, fake: Fake) -> None:
    page.open()
    fake.key = "right"
    page.ask()
    page.until_text("key", "asks for its key: the request has no API key.")
    page.press(Keys.ESCAPE)
    page.finish()
    assert page.text("key") == ""


def test_a_server_that_is_loading(page: Page, fake: Fake) -> None:
    fake.health.extend([(503, {"status": "loading"})] * 2)
    page.load()
    page.until_text("answer", "being loaded")
    page.until(lambda: page.attribute("generate", "aria-disabled") == "false")
    assert not fake.health
    assert "being loaded" not in page.text("answer")
    fake.scripts.append(lambda sender: sender.complain(503, "Not yet."))
    fake.health.append((503, {"status": "loading"}))
    page.ask()
    page.until_text("answer", "being loaded")
    page.finish()
    assert page.row_text() == TEXT


@pytest.mark.parametrize("status, words", [("draining", "shutting down"), ("failed", "could not load")])
def test_a_server_that_will_not_be_ready(page: Page, fake: Fake, status: str, words: str) -> None:
    fake.health.append((503, {"status": status}))
    page.load()
    page.until_text("problem", words)
    page.click("retry")
    page.until(lambda: page.attribute("generate", "aria-disabled") == "false")


def test_a_queue_that_is_full(page: Page, fake: Fake) -> None:
    fake.scripts.append(lambda sender: sender.complain(429, "the queue is full", Retry_After="1"))
    page.open().ask()
    page.until_text("answer", "the queue is full. Trying again in 1 s.")
    page.finish()
    assert page.row_text() == TEXT
    assert len(fake.asked) == 2


def test_a_form_that_is_not_filled_sends_nothing(page: Page, fake: Fake) -> None:
    page.open()
    for send in (lambda: page.click("generate"), lambda: page.press(Keys.ENTER, control=True)):
        send()
        assert page.focused() == "prompt"
        page.click("compare")
        assert page.focused() == "prompt"
    assert not fake.asked


# Keyboard, screen reader, window.


def test_with_the_keyboard_alone(page: Page, fake: Fake) -> None:
    page.open().press(Keys.TAB, "Speak.")
    seen = []
    for _ in range(12):
        seen.append(page.focused())
        assert page.js("return getComputedStyle(document.activeElement).outline").endswith("solid 2px")
        page.press(Keys.TAB)
    form = ["prompt", "generate", "compare", "stop", "cache", "block_length", "rule", "value", "max_tokens"]
    assert seen == [*form, "temperature", "seed", "confidence"]
    page.press(Keys.ENTER, control=True)
    page.finish()
    page.js("document.querySelector('[value=confidence]').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.focused() == "step"
    page.press(Keys.TAB)
    assert page.focused() == "play"
    page.press(Keys.TAB, Keys.ARROW_LEFT)
    assert page.focused() == "slider"
    assert page.numbers()["NFE"] == "4"
    page.press(Keys.END, Keys.TAB)
    assert page.focused() == "speed"
    page.press(Keys.TAB)
    assert page.focused() == "“Grüße”, position 1, step 1, confidence 0.970"
    assert page.text("hint").split("\n") == ["“Grüße”", "position 1", "step 1", "confidence 0.970"]
    page.press(Keys.ARROW_RIGHT)
    assert page.focused().startswith("“ 🎈”, position 2")
    page.press(Keys.ARROW_DOWN)
    assert page.focused().startswith("“&amp;”, position 5")
    page.press(Keys.ARROW_UP)
    assert page.focused().startswith("“⏎”, position 3")
    page.press(Keys.END)
    assert page.focused().startswith("“<|endoftext|>”, position 10")
    page.press(Keys.ARROW_RIGHT)
    assert page.focused().startswith("“<|endoftext|>”, position 10")  # nothing hidden is reached
    page.press(Keys.HOME)
    assert page.focused().startswith("“Grüße”")
    page.press(Keys.ESCAPE)
    assert page.text("hint") == ""
    page.press(Keys.TAB)
    assert page.js("return document.activeElement.tagName") == "SUMMARY"


def test_a_token_that_is_pointed_at_says_what_it_is(page: Page, fake: Fake) -> None:
    page.open().answer()
    cell = page.chrome.find_elements(By.CSS_SELECTOR, ".cell")[3]
    ActionChains(page.chrome, duration=0).move_to_element(cell).perform()
    assert page.text("hint").split("\n") == ["“<b>x</b>”", "position 4", "step 2", "confidence 0.800"]
    ActionChains(page.chrome, duration=0).move_to_element(page.find("hint")).perform()
    time.sleep(0.3)  # as long as it would be gone after
    assert page.text("hint") != ""  # it can be pointed at itself
    ActionChains(page.chrome, duration=0).move_to_element(page.find("prompt")).perform()
    page.until(lambda: page.text("hint") == "")


def test_what_a_screen_reader_is_told(page: Page, fake: Fake) -> None:
    gates = Gates()
    fake.scripts.append(tell(one_by_one(STEPS), gates))
    page.open()
    page.js(
        """window.told = [];
        const live = document.getElementById("live");
        new MutationObserver(() => window.told.push([performance.now(), live.textContent]))
          .observe(live, {childList: true});"""
    )
    page.ask()
    told = lambda: [words for _, words in page.js("return window.told")]  # noqa: E731
    page.until(lambda: told() == ["Generating with dual cache, threshold 0.9."])
    row = page.chrome.find_element(By.CSS_SELECTOR, ".row")
    assert row.get_attribute("role") == "img"  # its cells are not read out
    assert page.js("return document.querySelectorAll('.row [tabindex], .row [role]').length") == 0
    gates.open(4)
    page.until(lambda: len(told()) == 2)
    assert told()[-1] == "Block 1 of 3 finished."
    gates.open(9)
    page.until(lambda: len(told()) == 3)
    assert told()[-1] == f"Finished: 10 tokens in 12 forwards and 6.00 seconds. The answer: {TEXT}"
    times = [time for time, _ in page.js("return window.told")]
    assert min(b - a for a, b in itertools.pairwise(times)) >= 990
    assert row.get_attribute("role") == "listbox"
    assert page.js("return document.querySelectorAll('.row > [role=option][aria-label]').length") == 12
    assert page.js("return document.querySelectorAll('.row > [tabindex=\"0\"]').length") == 1


def test_everything_has_a_name_and_a_place(page: Page, fake: Fake) -> None:
    fake.model["id"] = "fastdllm-demo"
    fake.model["fastdllm"]["has_chat"] = True
    fake.scripts.extend([tell(STEPS, chat=True)] * 2)
    page.open()
    page.click("compare")
    page.finish()
    page.js("for (const id of ['problem', 'key']) document.getElementById(id).hidden = false;")
    page.chrome.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.chrome.execute_cdp_cmd("Accessibility.disable", {})
    shown = [node for node in nodes if not node["ignored"]]
    roles = [node["role"]["value"] for node in shown]
    named = {
        "button", "textbox", "combobox", "spinbutton", "slider", "radio", "checkbox", "listbox", "option",
        "form", "region",
    }  # fmt: skip
    assert [n for n in shown if n["role"]["value"] in named and not n.get("name", {}).get("value")] == []
    fields = "[...document.querySelectorAll('input, select, textarea')]"
    assert page.js(f"return {fields}.filter((one) => !one.labels.length && !one.ariaLabel)") == []
    assert {"banner", "main", "form", "region", "alert", "status", "listbox", "slider"} <= set(roles)
    assert page.js("return document.documentElement.lang") == "en"
    assert page.chrome.title == "fastdllm-demo – fastdllm_ext"
    headings = page.js("return [...document.querySelectorAll('h1, h2, h3')].map((one) => one.tagName)")
    assert headings == ["H1", "H2", "H3", "H3"]
    ids = page.js("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    assert page.js("return [...document.querySelectorAll('*')].every((one) => one.tabIndex <= 0)")


def test_a_narrow_window_scrolls_down_only(page: Page, fake: Fake) -> None:
    fake.model["id"] = "fastdllm-demo-" + "x" * 60
    page.look(width=360, height=640)
    beyond = lambda: page.js("const at = document.documentElement; return at.scrollWidth - at.clientWidth")  # noqa: E731
    page.open()
    assert beyond() == 0
    fake.scripts.extend([tell([[(0, "w" * 100, 0.9)], *STEPS[1:]]), tell(one_by_one(STEPS))])
    page.click("compare")
    page.finish()
    assert beyond() == 0
    ActionChains(page.chrome, duration=0).move_to_element(
        page.chrome.find_elements(By.CSS_SELECTOR, ".cell")[3]
    ).perform()
    assert page.text("hint")
    assert beyond() == 0
    fake.scripts.append(lambda sender: sender.complain(400, "x" * 200))
    page.answer()
    assert beyond() == 0
    box = page.find("problem").rect
    top = page.js("return scrollY")
    assert top <= box["y"] < box["y"] + box["height"] <= top + 640  # it is where the reader is
    fake.key = "right"
    page.ask()
    page.until_text("key", "asks for its key")
    assert beyond() == 0
    page.press(Keys.ESCAPE)
    page.finish()


def test_what_is_no_json_is_shown(page: Page, fake: Fake) -> None:
    def script(sender: Sender) -> None:
        sender.open_stream()
        sender.send_events(opening(), step(0, STEPS[0]), "<html>")
        sender.end_stream()

    fake.scripts.append(script)
    page.open().answer()
    assert "does not understand: <html>" in page.text("problem")


# The real server.


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `fastdllm-ext serve` with the bundled model."""
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        reason = f"{missing[0]} is not installed (pip install 'fastdllm_ext[serve]')"
        assert os.environ.get("FASTDLLM_BROWSER") != "required", reason
        pytest.skip(reason)
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "fastdllm_ext", "serve", "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)  # between looks
        yield f"{found[0]}/"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def real_page(chrome: Chrome, real: str) -> Iterator[Page]:
    yield from watched(chrome, real)


def get(url: str, body: Json | None = None) -> Json:
    content = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, content, {"Content-Type": "application/json"}), timeout=SECONDS) as response:
        return json.load(response)


@pytest.mark.parametrize("chat", [True, False])
def test_the_real_server_answers_the_examples(real_page: Page, real: str, chat: bool) -> None:
    page = real_page.open()
    if not chat:
        page.click("chat")
    for example in page.find("examples").find_elements(By.TAG_NAME, "button"):
        example.click()
        page.click("generate")
        page.finish()
        assert page.text("problem") == ""
        body = {"model": "demo", "prompt": example.text, "cache": "dual", "threshold": 0.9, "max_tokens": 128}
        choice = get(f"{real}v1/completions", body)["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert page.row_text() == choice["text"] == page.server_text()


def test_the_real_server_side_by_side(real_page: Page) -> None:
    page = real_page.open()
    page.click("compare")
    page.finish()
    assert page.row_text(0) == page.row_text(1) != ""
    assert "the same text" in page.text("speedup")
    own, plain = (int(page.numbers(pane)["NFE"]) for pane in (0, 1))
    assert own < plain / 4
    page.find("slider").send_keys(Keys.HOME)
    assert set(page.cells(0)) == set(page.cells(1)) == {None}
    page.find("slider").send_keys(Keys.END)
    assert page.row_text(0) == page.row_text(1) != ""


def test_the_real_servers_complaint_is_shown(real_page: Page) -> None:
    page = real_page.open()
    page.fill(max_tokens="512")  # and the prompt are more than the model's positions
    page.click("generate")
    page.finish()
    assert "512" in page.text("problem")
    assert page.attribute("max_tokens", "aria-invalid") == "true"


def test_the_real_server_stops_with_the_page(real_page: Page, real: str) -> None:
    page = real_page.open()
    page.fill(max_tokens="480", temperature="2", seed="1")
    page.click("compare")
    page.until(lambda: page.numbers(1)["NFE"] not in ("0", "–"))
    page.click("stop")
    page.finish()
    page.until(lambda: get(f"{real}health")["running"] == 0)
    assert "stopped" in page.text("answer")
