from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastdllm_ext as fd
from fastdllm_ext import view
from fastdllm_ext.cli import main
from fastdllm_ext.commands.chat import Chat
from fastdllm_ext.commands.opening import check_for_model
from fastdllm_ext.demo_tasks import held_out
from fastdllm_ext.engine import Update
from fastdllm_ext.view import MASK, DenoisingView
from terminal import Terminal, screen_of, set_size, without_controls
from test_cli_generate import alone, checkpoint, demo

QUESTIONS = [problem.prompt for problem in held_out(6, seed=4)]
# A template that shows all of a conversation, in tokens that the demo model has.
ALL_TURNS = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' else '+\\n' }}{% endfor %}"


@pytest.fixture
def plain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`fastdllm-ext chat ARGUMENTS` without a terminal: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def plain(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main(["chat", "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return plain


@pytest.fixture
def engine() -> Iterator[fd.Engine]:
    with fd.Engine(*demo(), max_rows=1) as engine:
        yield engine


# --- Questions and answers ---------------------------------------------------------------------------


def test_questions_from_a_pipe(plain: Any) -> None:
    first, second = alone(QUESTIONS[:2])
    lines = f"{QUESTIONS[0]}\n\n  {QUESTIONS[1]}  \n"
    assert plain(stdin=lines) == (0, f"{first}\n{second}\n", "")
    (slow,) = alone(QUESTIONS[:1], steps=8, cache="prefix")
    status, out, err = plain(
        "demo", "--steps", "8", stdin=f"/set cache prefix\n{QUESTIONS[0]}\n/quit\n{QUESTIONS[1]}"
    )
    assert (status, out, err) == (0, slow + "\n", "")


def test_what_cannot_be_answered_leaves_the_rest(plain: Any) -> None:
    (answer,) = alone(QUESTIONS[:1])
    status, out, err = plain(stdin=f"/set threshold 2\n/dance\n{'Add 1 and 2. ' * 200}\n{QUESTIONS[0]}\n")
    assert (status, out) == (1, answer + "\n")
    threshold, dance, long = err.splitlines()
    assert threshold == "/set: threshold=2; takes a number above 0 and at most 1"
    assert dance.startswith("/dance: takes /help, /new, /undo, /set, /settings, /save, /quit")
    assert long.endswith("128 of them gen_length; takes 512 together")


def test_bad_arguments(plain: Any) -> None:
    for arguments, message in (
        (["--frame-seconds", "-1"], "--frame-seconds=-1.0; takes a number of 0 or more"),
        (["--steps", "4", "--factor", "1"], "takes only one of steps, threshold, factor and rule"),
        (["none such"], "none such: "),
    ):
        status, out, err = plain(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("fastdllm-ext chat: ")
        assert message in err


def test_ctrl_c_without_a_terminal_ends_it_all(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chat, "ask", interrupt)
    with pytest.raises(SystemExit) as stop:
        plain(stdin="a\nb\n")
    assert stop.value.code == 130


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that engines get, as text."""
    prompts: list[str] = []
    submit = fd.Engine.submit

    def spy(self: fd.Engine, ids: list[int], **arguments: Any) -> Any:
        request = submit(self, ids, **arguments)
        prompts.append(demo()[1].decode(ids))
        return request

    monkeypatch.setattr(fd.Engine, "submit", spy)
    return prompts


def test_the_conversation_is_the_prompt(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the chat template, turn by turn; /undo and /new shorten it."""
    prompts = spied(monkeypatch)
    model = checkpoint(tmp_path, ALL_TURNS)
    lines = ["Add 1 and 2.", "Add 3 and 4.", "/undo", "Add 5 and 6.", "/new", "Add 7 and 8.", "/save it.json"]
    status, out, err = plain(model, "--gen-length", "16", stdin="\n".join(lines))
    assert (status, err) == (0, "wrote it.json\n")
    first = prompts[0]
    assert first == "Add 1 and 2. "
    (answer,) = alone([first], gen_length=16)
    assert prompts[1:] == [
        f"{first}{answer}+\nAdd 3 and 4. ",
        f"{first}{answer}+\nAdd 5 and 6. ",
        "Add 7 and 8. ",
    ]
    assert out.startswith(answer + "\n")
    held = json.loads((tmp_path / "it.json").read_text())
    assert (held["model"], held["settings"]) == ("model", {"gen_length": 16})
    assert held["messages"] == [
        {"role": "user", "content": "Add 7 and 8."},
        {"role": "assistant", "content": alone(["Add 7 and 8. "], gen_length=16)[0]},
    ]


def test_without_a_template_each_question_goes_alone(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = spied(monkeypatch)
    model = checkpoint(tmp_path, None)
    _, out, err = plain(model, stdin="\n".join([*QUESTIONS[:2], "/save it.json"]))
    assert prompts == QUESTIONS[:2]
    assert out == "".join(answer + "\n" for answer in alone(QUESTIONS[:2]))
    assert err == "The tokenizer has no chat template: each question goes alone, as it is.\nwrote it.json\n"
    assert len(json.loads((tmp_path / "it.json").read_text())["messages"]) == 4


def test_oldest_turns_go_when_there_is_no_room(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = spied(monkeypatch)
    model = checkpoint(tmp_path, ALL_TURNS)
    first, second, third = (digit * 170 for digit in "135")  # of the model's 512 positions
    lines = [f"Add {number} and 2." for number in (first, second, third, "9" * 500, "7")]
    status, _, err = plain(model, "--gen-length", "48", stdin="\n".join([*lines, "/save it.json"]))
    assert status == 1, "the longest has no answer"
    for number, there in ((first, [1, 1, 0, 0]), (second, [0, 1, 1, 1]), (third, [0, 0, 1, 1])):
        assert [int(number in prompt) for prompt in prompts] == there
    said, refused, *_ = err.splitlines()
    assert said == "too long for the model: forgets the oldest 1 of 2 turns"
    assert refused.endswith("takes 512 together")
    assert len(json.loads((tmp_path / "it.json").read_text())["messages"]) == 6


def test_a_template_that_refuses(plain: Any, tmp_path: Path) -> None:
    model = checkpoint(
        tmp_path, "{% if messages | length > 1 %}{{ raise_exception('once') }}{% endif %}Add 1 and 2."
    )
    assert plain(model, stdin="a\nb\n/new\nc\n")[::2] == (1, "once\n")


def test_answers_sample_with_streams_of_their_own(plain: Any) -> None:
    settings = {"temperature": 4.0, "seed": 5, "gen_length": 24}
    wanted = alone([QUESTIONS[0]] * 3, **settings)
    assert len(set(wanted)) == 3
    options = ("--temperature", "4", "--seed", "5", "--gen-length", "24")
    assert plain(*options, stdin=f"{QUESTIONS[0]}\n" * 3)[1] == "".join(answer + "\n" for answer in wanted)


def test_settings_can_be_set_and_shown(engine: fd.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(engine, "demo")
    for line, settings in (
        ("/set gen_length 64", {"gen_length": 64}),
        ("/set steps 8", {"gen_length": 64, "steps": 8}),
        ("/set rule klass:kl=0.1", {"gen_length": 64, "rule": "klass:kl=0.1"}),
        ("/set  rule  null", {"gen_length": 64}),
        ("/set cache none", {"gen_length": 64, "cache": "none"}),
        ('/set rule {"name": "wino"}', {"gen_length": 64, "cache": "none", "rule": "wino"}),
    ):
        chat.take(line)
        assert chat.config == fd.GenerationConfig(**settings), line
    kept = chat.config
    assert not chat.failed
    for line, message in (
        ("/set gen_length", "/set: takes a name and a value"),
        ("/set", "/set: takes a name and a value"),
        ("/set gen_length much", "gen_length='much'; takes an int of 1 or more"),
        ("/set gen_length [1, 2]", "gen_length=[1, 2]; takes one number"),
        ("/set colour red", "unknown argument 'colour'; takes alg_temp, "),
        ("/set top_p 0.5", "llada takes neither; use temperature"),
        ("/undo", "/undo: nothing is there to take back"),
        ("/save", "/save: takes a file"),
        ("/save /none/such", "/save: [Errno 2] No such file or directory: '/none/such'"),
    ):
        capsys.readouterr()
        chat.take(line)
        assert message in capsys.readouterr().err
        assert chat.config == kept
    assert chat.failed
    chat.take("/settings")
    shown = dict(line.split(None, 1) for line in capsys.readouterr().err.splitlines())
    assert (shown["gen_length"], shown["rule"], shown["threshold"]) == ("64", str(kept.selection), "null")
    chat.take("/set rule null")
    chat.take("/settings")
    assert "\nthreshold      0.9\n" in capsys.readouterr().err, "what counts where nothing is said"
    chat.take("/help")
    printed = capsys.readouterr().err
    assert all(
        f"/{name}" in printed for name in ("help", "new", "undo", "set NAME VALUE", "save FILE", "quit")
    )
    check_for_model(engine.family, engine.geometry, kept)


# --- On a terminal -----------------------------------------------------------------------------------


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """Drawn in place, then printed; Ctrl-C stops an answer, which is forgotten, and at the prompt leaves."""
    (answer,) = alone(QUESTIONS[:1])
    with Terminal("chat", "--device", "cpu", "--frame-seconds", "0.05", cwd=tmp_path) as terminal:
        terminal.wait_for("demo: 2.7 M parameters. /help lists commands, Ctrl-D leaves.")
        terminal.wait_for("> ")
        terminal.send(QUESTIONS[0] + "\n")
        terminal.wait_for("step   1 [")
        terminal.send("/set steps 400\n")  # before the answer is there
        terminal.wait_for(" tokens a forward, ")
        terminal.wait_for("> /set steps 400")
        terminal.wait_for("> ")
        terminal.send("/set gen_length 400\n")
        terminal.wait_for("> ")
        terminal.send(QUESTIONS[1] + "\n")  # 400 frames of 0.05 s
        terminal.wait_for("step   2 [")
        terminal.send("\x03")
        terminal.wait_for("stopped; the question and what came of its answer are forgotten")
        terminal.wait_for("> ")
        terminal.send("/save it.json\n")
        terminal.wait_for("wrote it.json")
        terminal.wait_for("> ")
        # The newline: Python sees a signal that comes just before readline waits for keys only after a line.
        terminal.send("\x03\n")
        assert terminal.status() == 0
    assert "Traceback" not in terminal.output
    assert "\x1b[32m" in terminal.output, "green for a confident token"
    screen = screen_of(terminal.output)
    assert not any("step" in line and "[" in line for line in screen), "no frame is left"
    asked = screen.index(f"> {QUESTIONS[0]}")
    lines = answer.splitlines()
    assert screen[asked + 1 : asked + 1 + len(lines)] == lines
    assert screen[asked + 1 + len(lines)].split(", ")[0].split()[1] == "tokens"
    held = json.loads((tmp_path / "it.json").read_text())
    assert [message["content"] for message in held["messages"]] == [QUESTIONS[0], answer]


def test_leaving_a_terminal_and_its_history(tmp_path: Path) -> None:
    """The arrow upwards asks again, where there is readline; Ctrl-D leaves. NO_COLOR is heard."""
    pytest.importorskip("readline")
    with Terminal("chat", "--device", "cpu", cwd=tmp_path, NO_COLOR="1") as terminal:
        for keys in (QUESTIONS[0] + "\n", "\x1b[A\n"):
            terminal.wait_for("> ")
            terminal.send(keys)
            terminal.wait_for(" tokens a forward, ")
        terminal.wait_for("> ")
        terminal.send("\x04")
        assert terminal.status() == 0
    screen = screen_of(terminal.output)
    assert screen.count(f"> {QUESTIONS[0]}") == 2
    assert screen.count(alone(QUESTIONS[:1])[0].splitlines()[-1]) == 2
    assert not re.search(r"\x1b\[3\dm", terminal.output)
    assert "\x1b[2m" not in terminal.output


class Screen(io.StringIO):
    """A terminal that can fail."""

    def __init__(self, when: Callable[[str], None] = lambda text: None) -> None:
        super().__init__()
        self.when = when

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.when(text)
        return super().write(text)


def test_an_interrupted_answer_frees_its_pages(engine: fd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first frame, at a later one, and while its end is waited for; the next answer is right."""

    def interrupted_at(word: str) -> Screen:
        def when(text: str) -> None:
            if word in text:
                raise KeyboardInterrupt

        return Screen(when)

    chat = Chat(engine, "demo", terminal=True)
    monkeypatch.setattr(view, "LEAST_SECONDS", 0.0)
    for word in ("step   0 ", "step   3 "):
        monkeypatch.setattr(sys, "stdout", interrupted_at(word))
        with pytest.raises(KeyboardInterrupt):
            chat.take(QUESTIONS[0])
        assert chat.messages == []
        settle(engine)
    chat.live = False
    monkeypatch.setattr(fd.engine.Request, "result", interrupt)
    monkeypatch.setattr(sys, "stdout", Screen())
    with pytest.raises(KeyboardInterrupt):
        chat.take(QUESTIONS[0])
    monkeypatch.undo()
    settle(engine)
    assert engine.stats.cancelled >= 1
    monkeypatch.setattr(sys, "stdout", Screen())
    chat.take(QUESTIONS[1])
    assert sys.stdout.getvalue().startswith(alone(QUESTIONS[1:2])[0] + "\n")  # type: ignore[attr-defined]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def settle(engine: fd.Engine) -> None:
    """Waits until nothing runs; then all pages are free."""
    with engine._lock:
        assert engine._lock.wait_for(lambda: engine._idle, 60)
    assert engine.stats.free_pages == engine.stats.num_pages


def test_an_answer_cannot_control_the_terminal(engine: fd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model says is shown: colours, bells and jumps of its own are not carried out."""
    tokenizer = Letters({3: "\x1b[2J", 4: "\x07", 5: "a\nb\tc", 6: "\x9b1F"})
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    chat = Chat(engine, "demo", terminal=True)
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(engine._scheduler, "decode", lambda tokens: tokenizer.decode([3, 4, 5, 6]))
    chat.take("?")
    assert "·[2J·a\nb\tc·1F\n" in screen.getvalue()
    assert not {"\x07", "\x9b"} & set(screen.getvalue())
    assert "\x1b[2J" not in screen.getvalue()


# --- The view ----------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single letters, or of what it is told; token 0 ends the text."""

    chat_template = None

    def __init__(self, pieces: dict[int, str] | None = None) -> None:
        self.pieces = pieces or {}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(self.pieces.get(token, chr(95 + token % 26)) for token in tokens)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [10 + ord(c) % 100 for c in text]}


MARK = "\x1b[m"  # which a view does not write


class Drawn:
    """A view on a pseudo-terminal, and what it wrote."""

    def __init__(self, length: int, columns: int, rows: int, tokenizer: Any = None, **arguments: Any) -> None:
        self.ours, theirs = pty.openpty()
        set_size(self.ours, columns, rows)
        self.columns, self.output = columns, ""
        self.file = os.fdopen(theirs, "w", encoding="utf-8")
        self.view = DenoisingView(
            tokenizer or Letters(), length, eos_ids=(0,), file=self.file, frame_seconds=0.0, **arguments
        )
        self._bytes, self._marks = b"", 0

    def commit(self, step: int, positions: Any, tokens: Any = None, confidence: float = 1.0) -> None:
        places = list(positions)
        found = [1 + place % 20 for place in places] if tokens is None else tokens
        self.view.on_commit(fd.Commit(0, step, places, found, [confidence] * len(places)))

    def lines(self) -> list[str]:
        """What stands on the screen."""
        self._marks += 1
        self.file.write(MARK)
        self.file.flush()
        while self._bytes.count(MARK.encode()) < self._marks:
            self._bytes += os.read(self.ours, 65536)
        self.output = self._bytes.decode().replace(MARK, "")
        return [line for line in screen_of(self.output, self.columns) if line]

    def close(self) -> None:
        self.file.close()
        os.close(self.ours)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Drawn]]:
    monkeypatch.setattr(view, "LEAST_SECONDS", 0.0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    made: list[Drawn] = []

    def make(*arguments: Any, **more: Any) -> Drawn:
        made.append(Drawn(*arguments, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_frames_take_the_place_of_one_another(drawn: Callable[..., Drawn]) -> None:
    on = drawn(30, 24, 20)
    on.view.draw()
    assert on.lines() == ["  step   0 [", "    " + 19 * MASK, "    " + 11 * MASK]
    on.commit(0, range(0, 10))
    on.commit(1, range(10, 30))
    head, *text = on.lines()
    assert head.startswith("  step   2 [███")
    assert text == ["    " + "".join(chr(96 + i % 20) for i in part) for part in (range(19), range(19, 30))]
    on.view.clear()
    assert on.lines() == []


def test_an_answer_longer_than_the_screen(drawn: Callable[..., Drawn]) -> None:
    """The lines around the first open position; nothing scrolls, so all of it can be erased."""
    on = drawn(200, 60, 7)  # 55 columns of text a line: 4 lines; of 10 columns 20 lines
    set_size(on.ours, 15, 7)
    on.columns = 15
    for step in range(20):
        on.commit(step, range(10 * step, 10 * step + 10))
        lines = on.lines()
        assert len(lines) == 6, "one less than the terminal has"
        assert step == 19 or any(MASK in line for line in lines), "what is being filled can be seen"
        assert step == 0 or any(MASK not in line for line in lines[1:])
    on.view.clear()
    assert on.lines() == []
    set_size(on.ours, 80, 7)
    on.columns = 80
    on.view.restart(5)
    assert ", lines" not in on.lines()[0], "4 lines have room"
    big = drawn(2000, 80, 12)
    big.commit(0, range(1000))
    assert big.lines()[0].endswith("1000/2000 tokens, lines 9-18 of 27")


def test_a_restart_opens_what_came_since(drawn: Callable[..., Drawn]) -> None:
    on = drawn(6, 60, 10)
    on.commit(0, [0, 1])
    on.commit(1, [2])
    on.commit(2, [4])
    assert on.lines()[1] == "    `ab" + MASK + "d" + MASK
    on.view.restart(1)
    head, text = on.lines()
    assert text == "    `a" + 4 * MASK
    assert head.split() == ["step", "1", "[████████", "]", "2/6", "tokens"]
    on.commit(1, [3])
    assert on.lines()[1] == "    `a" + MASK + "c" + 2 * MASK


def test_a_terminal_made_narrower(drawn: Callable[..., Drawn]) -> None:
    """Its lines then lie on several rows each, all of which are erased."""
    on = drawn(100, 105, 40)
    on.commit(0, range(50))
    before = on.lines()
    assert [len(line) for line in before] == [52, 104]
    written = len(on.output)
    set_size(on.ours, 40, 40)
    on.commit(1, range(50, 60))
    on.lines()
    assert on.output[written:].startswith(f"\x1b[{2 + 3}F\x1b[J"), "of 52 columns, and of 104"
    widths = [len(line) for line in without_controls(on.output[written:]).splitlines()]
    assert max(widths) < 40


def test_wide_and_unseen_characters(drawn: Callable[..., Drawn]) -> None:
    pieces = {1: "日本", 2: "e\u0301", 3: "\x1b[2J", 4: "a\tb\n", 5: "\u200b", 6: "wider than it"}
    on = drawn(6, 16, 20, Letters(pieces))
    on.commit(0, range(6), [1, 2, 3, 4, 6, 5])
    on.lines()
    text = without_controls(on.output)
    assert "\x1b[2J" not in on.output
    lines = [line[4:] for line in text.replace("\r", "").splitlines()[1:]]
    assert lines == ["日本e\u0301·[2Ja⇥", "b⏎wider tha", "n it\u200b"]


def test_colours(drawn: Callable[..., Drawn], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        on = drawn(4, 60, 10)
        for i, confidence in enumerate((0.95, 0.6, 0.2, -3.0)):
            on.commit(i, [i], confidence=confidence)
        on.lines()
        return on.output

    assert "\x1b[32m`\x1b[0m\x1b[33ma\x1b[0m\x1b[31mbc\x1b[0m" in shown(), "of one colour in one go"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[3\dm", shown())
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[32m" in shown()


def test_frames_that_nobody_could_see_are_left_out(
    drawn: Callable[..., Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting; the last one is always drawn."""
    slept: list[float] = []
    now = [100.0]
    monkeypatch.setattr(view, "LEAST_SECONDS", 0.04)
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(view.time, "sleep", slept.append)
    on = drawn(11, 60, 10)
    for step in range(11):
        on.commit(step, [step])
        now[0] += 0.015
    on.view.end()
    on.lines()
    assert re.findall(r"step +(\d+)", on.output) == ["1", "4", "7", "10", "11"]
    on.view.end()
    assert on.output.count("step") == 5
    assert slept == []
    on.view.frame_seconds = 0.5
    on.commit(0, [0])
    on.commit(1, [1])
    on.lines()
    assert on.output.count("step") == 7
    assert slept == [0.5, 0.5]


def test_what_an_engine_tells_is_drawn(engine: fd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits, and a restart, of a request that is put aside."""

    class Told:
        row = type("Row", (), {"first": 10, "end": 14})
        common = type("Common", (), {"geometry": engine.geometry})

        def __iter__(self) -> Iterator[Update]:
            yield Update(commits=(fd.Commit(0, 0, [0], [5], [1.0]), fd.Commit(0, 1, [1], [6], [1.0])))
            yield Update(restarted_at=1)
            yield Update(commits=(fd.Commit(0, 1, [3], [7], [1.0]),))

    monkeypatch.setattr(view, "LEAST_SECONDS", 0.0)
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    chat = Chat(engine, "demo", terminal=True)
    monkeypatch.setattr(engine, "tokenizer", Letters())
    chat._draw(Told())  # type: ignore[arg-type]
    text = [line for line in without_controls(screen.getvalue()).splitlines() if line.startswith("    ")]
    m = MASK
    assert [line[4:] for line in text] == [4 * m, "d" + 3 * m, "de" + 2 * m, "d" + 3 * m, "d" + 2 * m + "f"]
    assert screen_of(screen.getvalue()) == [""]
