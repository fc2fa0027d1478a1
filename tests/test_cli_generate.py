from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.cli import main
from fastdllm_ext.commands.generate import Printed
from fastdllm_ext.demo_tasks import held_out
from terminal import Terminal, without_controls

PROBLEMS = held_out(12, seed=3)
PROMPTS = [problem.prompt for problem in PROBLEMS]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`fastdllm-ext generate ARGUMENTS` in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str | bytes = "") -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        status = main(["generate", "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@lru_cache
def demo() -> tuple[Any, Any]:
    return fd.load(fd.demo_model_path(), device="cpu")


def alone(prompts: list[str], **settings: Any) -> list[str]:
    """What fd.generate gives, as text."""
    model, tokenizer = demo()
    ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    answers = fd.generate(model, ids, **settings).answers()
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def write(path: Path, *objects: Any) -> str:
    path.write_text("".join(json.dumps(held) + "\n" for held in objects))
    return path.name


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def timeless(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted, without what differs from run to run."""
    kept = [{key: value for key, value in answer.items() if key != "seconds"} for answer in answers]
    return sorted(kept, key=lambda answer: str(answer["id"]))


# --- Where prompts come from, where answers go -------------------------------------------------------


def test_prompts_from_arguments(run: Run) -> None:
    first, second = alone(PROMPTS[:2])
    assert run("--prompt", PROMPTS[0]) == (0, first + "\n", "")
    both = f"==> 1 <==\n{first}\n\n==> 2 <==\n{second}\n"
    assert run("demo", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]) == (0, both, "")


def test_prompts_from_stdin_and_files(run: Run, tmp_path: Path) -> None:
    wanted = alone(PROMPTS[:3])
    assert run(stdin=PROMPTS[0] + "\n")[1] == wanted[0] + "\n"
    assert run(stdin=f"{PROMPTS[0]}\r\n")[1] == wanted[0] + "\n"
    two_lines = f"{PROMPTS[0]}\n{PROMPTS[1]}"
    (whole,) = alone([two_lines])
    assert run(stdin=two_lines + "\n")[1] == whole + "\n", "all of it is one prompt"
    (tmp_path / "a").write_text(f"\ufeff{PROMPTS[0]}\n\n{PROMPTS[1]}\r\n", encoding="utf-8")
    (tmp_path / "b").write_text(PROMPTS[2])
    status, out, _ = run("--file", "a", "--file", "b", "--lines", "--json")
    assert status == 0
    assert [(answer["id"], answer["text"]) for answer in objects(out)] == [
        (1, wanted[0]), (3, wanted[1]), (4, wanted[2]),
    ]  # fmt: skip
    assert objects(out)[0]["prompt_tokens"] == len(demo()[1](PROMPTS[0])["input_ids"]), "no byte order mark"
    status, out, _ = run("--lines", "--json", stdin=two_lines)
    assert [answer["text"] for answer in objects(out)] == wanted[:2]
    status, out, _ = run("--file", "b", "--file", "-", "--json", stdin=PROMPTS[1])
    assert [answer["text"] for answer in objects(out)] == [wanted[2], wanted[1]]


def test_an_answer_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdout, shown in ((Screen(), "·[2J\t日\n"), (io.StringIO(), "\x1b[2J\t日\n")):
        monkeypatch.setattr(sys, "stdout", stdout)
        Printed(["a"], as_json=False).add({"id": "a", "text": "\x1b[2J\t日"})
        assert stdout.getvalue() == shown


def test_a_line_separator_ends_no_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("Add 1\u2028and 2.\nAdd\x0c3.\n", encoding="utf-8")
    _, out, _ = run("--file", "a", "--lines", "--json", "--gen-length", "4")
    assert [answer["id"] for answer in objects(out)] == [1, 2]


def test_jsonl_with_settings_of_its_lines(run: Run, tmp_path: Path) -> None:
    """Text, token ids, messages; each line's settings; what else it says is passed on."""
    model, tokenizer = demo()
    ids = tokenizer(PROMPTS[1])["input_ids"]
    name = write(
        tmp_path / "in.jsonl",
        {"prompt": PROMPTS[0], "level": {"of": 3}, "until": None},
        {"prompt": ids, "id": "two", "steps": 16, "max_tokens": 64},
        {"messages": [{"role": "user", "content": PROMPTS[2]}], "id": 7, "cache": "none"},
    )
    status, out, err = run("--jsonl", name, "--json", "--block-length", "16")
    assert (status, err) == (0, "")
    first, second, third = objects(out)
    common: dict[str, Any] = {"block_length": 16}
    for answer, prompt, settings in (
        (first, PROMPTS[0], {}),
        (second, PROMPTS[1], {"steps": 16, "gen_length": 64}),
        (third, PROMPTS[2], {"cache": "none"}),
    ):
        encoded = torch.tensor(tokenizer(prompt)["input_ids"])
        output = fd.generate(model, [encoded], **common, **settings)
        assert answer["text"] == tokenizer.decode(output.answers()[0], skip_special_tokens=True)
        assert (answer["nfe"], answer["tokens"]) == (int(output.nfe[0]), len(output.answers()[0]))
        assert answer["prompt_tokens"] == len(encoded)
        assert answer["finish_reason"] == ("stop" if int(output.answers()[0][-1]) == 1 else "length")
        assert 0 < answer["seconds"] < 60
    assert list(first) == [
        "id", "text", "finish_reason", "prompt_tokens", "tokens", "nfe", "seconds", "hash", "level", "until",
    ]  # fmt: skip
    assert (first["id"], second["id"], third["id"]) == (1, "two", 7)
    assert (first["level"], first["until"]) == ({"of": 3}, None)


def test_a_chat_template_is_used_when_asked_for(run: Run, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "{{ messages[-1]['content'] }}{% if add_generation_prompt %}.{% endif %}")
    bare = PROMPTS[0].removesuffix(".")
    assert run(folder, "--prompt", bare, "--chat")[1] == alone([PROMPTS[0]])[0] + "\n"
    assert run(folder, "--prompt", bare)[1] == alone([bare])[0] + "\n"
    refusing = checkpoint(tmp_path, "{{ raise_exception('no ' + messages[0]['role']) }}", "refusing")
    status, out, err = run(refusing, "--prompt", bare, "--chat")
    assert (status, out, err) == (1, "", "fastdllm-ext generate: 1: no user\n")
    none = checkpoint(tmp_path, None, "none")
    assert run(none, "--prompt", bare, "--chat")[2] == (
        "fastdllm-ext generate: --chat: the tokenizer of none has no chat template\n"
    )
    name = write(tmp_path / "in.jsonl", {"prompt": bare}, {"messages": [{"role": "user", "content": bare}]})
    assert "in.jsonl:2: the tokenizer of none has no chat template" in run(none, "--jsonl", name)[2]


def checkpoint(folder: Path, template: str | None, name: str = "model") -> str:
    """The demo model with another chat template."""
    (folder / name).mkdir()
    for file in fd.demo_model_path().iterdir():
        if file.suffix in (".json", ".safetensors"):
            (folder / name / file.name).symlink_to(file)
    if template is not None:
        (folder / name / "chat_template.jinja").write_text(template)
    return name


def test_settings_options(run: Run, tmp_path: Path) -> None:
    """Each reaches the generation; they count before a saved configuration, and that before the defaults."""
    fd.GenerationConfig(gen_length=48, steps=12, cache="prefix").save_pretrained(tmp_path / "saved")
    for options, settings in (
        ([], {}),
        (["--generation-config", "saved"], {"gen_length": 48, "steps": 12, "cache": "prefix"}),
        (
            ["--generation-config", "saved", "--threshold", "0.99", "--block-length", "8"],
            {"gen_length": 48, "threshold": 0.99, "cache": "prefix", "block_length": 8},
        ),
        (["--factor", "0.5", "--refresh", "2"], {"factor": 0.5, "refresh": 2}),
        (
            ["--rule", "klass:kl=0.1", "--cache", "none", "--refresh", "block"],
            {"rule": "klass:kl=0.1", "cache": "none"},
        ),
        (["--gen-length", "20", "--steps", "5"], {"gen_length": 20, "steps": 5}),
    ):
        model, tokenizer = demo()
        output = fd.generate(model, [torch.tensor(tokenizer(PROMPTS[0])["input_ids"])], **settings)
        (answer,) = objects(run("--prompt", PROMPTS[0], "--json", *options)[1])
        assert answer["text"] == tokenizer.decode(output.answers()[0], skip_special_tokens=True)
        assert answer["nfe"] == int(output.nfe[0]), options


# --- Sampling ----------------------------------------------------------------------------------------


def test_prompt_i_samples_with_stream_i(run: Run, tmp_path: Path) -> None:
    """As row i of fd.generate does, whatever is decoded at once; a line's own seed, as alone."""
    settings = {"temperature": 4.0, "seed": 5, "gen_length": 24}
    wanted = alone([PROMPTS[0]] * 5, **settings)
    assert len(set(wanted)) > 2
    lines: list[dict[str, Any]] = [{"prompt": PROMPTS[0]} for _ in range(5)]
    lines[3]["seed"] = 8
    wanted[3] = alone([PROMPTS[0]], **settings | {"seed": 8})[0]
    name = write(tmp_path / "in.jsonl", *lines)
    options = ("--jsonl", name, "--json", "--temperature", "4", "--seed", "5", "--gen-length", "24")
    for rows in ("1", "64"):
        out = run(*options, "--max-rows", rows)[1]
        assert [answer["text"] for answer in objects(out)] == wanted


def test_a_seed_is_drawn_and_kept(run: Run, tmp_path: Path) -> None:
    """Runs differ; one that goes on does not. Nothing is drawn where nothing is sampled."""
    options = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--gen-length", "24")
    sampled = (*options, "--temperature", "4")
    texts = {run(*sampled)[1] for _ in range(4)}
    assert len(texts) > 1
    assert run(*sampled, "--out", "out.jsonl")[0] == 0
    whole = (tmp_path / "out.jsonl").read_text()
    seed = json.loads((tmp_path / "out.jsonl.run.json").read_text())["settings"]["seed"]
    assert seed > 0
    (tmp_path / "out.jsonl").write_text(whole.splitlines(keepends=True)[0])
    assert run(*sampled, "--out", "out.jsonl")[0] == 0
    assert timeless(objects((tmp_path / "out.jsonl").read_text())) == timeless(objects(whole))
    assert run(*options, "--out", "greedy.jsonl")[0] == 0
    assert json.loads((tmp_path / "greedy.jsonl.run.json").read_text())["settings"]["seed"] == 0


# --- A record that goes on ---------------------------------------------------------------------------


def lines_of(tmp_path: Path, count: int = 12) -> str:
    return write(
        tmp_path / "in.jsonl",
        *({"prompt": prompt, "id": f"p{n}", "kind": n % 3} for n, prompt in enumerate(PROMPTS[:count])),
    )


# The program, killed in its n-th wait for the disk: after n lines, of which the last may not be whole.
KILLED = """
import os, signal, sys
from fastdllm_ext.cli import main
from fastdllm_ext.commands.generate import Printed
fsync, left = os.fsync, [int(sys.argv[1])]
def dying(file):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = dying
sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on(run: Run, tmp_path: Path) -> None:
    """What it gives at last is what one run gives: sampled, settings drawn, a torn line at the end."""
    name = lines_of(tmp_path)
    options = ("--jsonl", name, "--temperature", "4", "--max-rows", "3", "--quiet")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "6", "generate", "--device", "cpu", *options, "--out", "out.jsonl"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    out = tmp_path / "out.jsonl"
    before = out.read_bytes()
    assert before.count(b"\n") == 5, "the first wait was for what run it is"
    out.write_bytes(before[:-7])
    assert run(*options, "--out", "out.jsonl") == (0, "", "")
    after = out.read_bytes()
    assert after.startswith(before[: before[:-1].rindex(b"\n") + 1]), "what was there stays as it was"
    seed = json.loads((tmp_path / "out.jsonl.run.json").read_text())["settings"]["seed"]
    assert run(*options, "--out", "whole.jsonl", "--seed", str(seed)) == (0, "", "")
    assert timeless(objects(after.decode())) == timeless(objects((tmp_path / "whole.jsonl").read_text()))
    assert len(after.splitlines()) == 12


def test_what_is_answered_is_not_asked_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = lines_of(tmp_path, 4)
    assert run("--jsonl", name, "--out", "out.jsonl")[2] == "4 of 4 prompts answered in out.jsonl\n"
    whole = (tmp_path / "out.jsonl").read_bytes()
    asked: list[Any] = []
    submit = fd.Engine.submit

    def spied(self: fd.Engine, ids: Any, **arguments: Any) -> Any:
        asked.append(ids)
        return submit(self, ids, **arguments)

    monkeypatch.setattr(fd.Engine, "submit", spied)
    assert run("--jsonl", name, "--out", "out.jsonl")[0] == 0
    assert asked == []
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    lines_of(tmp_path, 6)  # two more prompts
    assert run("--jsonl", name, "--out", "out.jsonl")[2] == "6 of 6 prompts answered in out.jsonl\n"
    assert len(asked) == 2
    assert run("--jsonl", name, "--out", "out.jsonl", "--restart", "--threshold", "0.8", "--quiet")[2] == ""
    assert len(asked) == 8
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 6


def test_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    """With what differs; and what is there stays."""
    name = lines_of(tmp_path, 3)
    assert run("--jsonl", name, "--out", "out.jsonl", "--threshold", "0.9")[0] == 0
    out, about = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    whole, facts = out.read_bytes(), about.read_bytes()
    changed = checkpoint(tmp_path, None)
    (tmp_path / changed / "model.safetensors").unlink()
    other = fd.load(fd.demo_model_path(), device="cpu")[0]
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    other.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / changed / "model.safetensors")

    options = ("--jsonl", name, "--out", "out.jsonl")
    for more, difference in (
        (["--threshold", "0.8"], "settings.threshold was 0.9, is 0.8;"),
        (["--factor", "1"], "settings.threshold was 0.9, is None; settings.factor was None, is 1.0"),
        (["--threshold", "0.9", "--seed", "3"], "settings.seed was 0, is 3;"),
        (["--threshold", "0.9", "--chat"], "chat was False, is True;"),
        (["--threshold", "0.9", "--dtype", "bfloat16"], "dtype was 'float32', is 'bfloat16';"),
        (["--threshold", "0.9", "--runtime", "modules"], "runtime was 'auto', is 'modules';"),
        ([changed, "--threshold", "0.9"], "model was 'demo', is 'model'; weights was "),
    ):
        status, _, err = run(*more, *options)
        assert status == 2
        assert err.startswith("fastdllm-ext generate: out.jsonl: is of another run: "), err
        assert difference in err
        assert err.endswith("; takes the same, --restart, or another file\n")
    first, *others = objects((tmp_path / "in.jsonl").read_text())
    for change in ({"prompt": PROMPTS[1]}, {"kind": 1}, {"more": 1}, {"steps": 16}, {"seed": 4}):
        write(tmp_path / "in.jsonl", first | change, *others)
        refusal = run(*options, "--threshold", "0.9")[2]
        assert "in.jsonl:1: is not what out.jsonl answers as id 'p0'" in refusal, change
    lines_of(tmp_path, 2)
    assert "answers id 'p2', which is none of the prompts" in run(*options, "--threshold", "0.9")[2]
    assert (out.read_bytes(), about.read_bytes()) == (whole, facts)
    same = fd.demo_model_path()
    lines_of(tmp_path, 3)
    assert run(str(same), *options, "--threshold", "0.9")[0] == 0, "by another name it is the same model"


def test_files_that_are_no_records(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("my notes")
    options = ("--prompt", PROMPTS[0], "--out", "out.jsonl")
    assert "holds something already, and no out.jsonl.run.json says of what run" in run(*options)[2]
    assert out.read_text() == "my notes"
    assert run(*options, "--restart")[0] == 0
    (answer,) = objects(out.read_text())
    out.write_text(f"?\n{json.dumps(answer)}\n")
    assert run(*options)[::2] == (
        2,
        "fastdllm-ext generate: out.jsonl:1: holds no answer; takes --restart, or another file\n",
    )
    out.write_text(json.dumps(answer) + "\n\0\0\0\n")
    assert run(*options)[0] == 0
    assert objects(out.read_text()) == [answer], "what a crash left at the end is cut off"
    with open(out, "ab") as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(*options)[2] == "fastdllm-ext generate: out.jsonl: another process writes it\n"
    assert "No such file or directory: 'none/out.jsonl'" in run(*options[:-1], "none/out.jsonl")[2]


def test_ctrl_c_stops_and_the_same_command_goes_on(run: Run, tmp_path: Path) -> None:
    """On a terminal, under its progress bar; the rest is answered by the next run."""
    name = write(tmp_path / "in.jsonl", *({"prompt": f"Add {n} and 77."} for n in range(100, 400)))
    options = ("--jsonl", name, "--out", "out.jsonl", "--max-rows", "1", "--gen-length", "16")
    slow = ("--cache", "none", "--steps", "16")  # longer than it takes to see it and to stop it
    with Terminal("generate", "--device", "cpu", *options, *slow, cwd=tmp_path) as terminal:
        terminal.wait_for("1/300 [")
        terminal.wait_for("tokens/s")
        terminal.send("\x03")
        terminal.wait_for("fastdllm-ext generate: stopped: ")
        terminal.wait_for(" of 300 prompts answered in out.jsonl\r\nThe same command goes on.")
        assert terminal.status() == 130
    printed = without_controls(terminal.output)
    assert "Traceback" not in printed
    said = int(printed.split("stopped: ")[1].split()[0])
    answers = objects((tmp_path / "out.jsonl").read_text())
    assert 0 < said == len(answers) < 300
    write(tmp_path / "in.jsonl", *({"prompt": f"Add {n} and 77."} for n in range(100, 100 + said + 2)))
    assert run(*options, *slow)[::2] == (0, f"{said + 2} of {said + 2} prompts answered in out.jsonl\n")


# --- What cannot be answered -------------------------------------------------------------------------


def test_a_prompt_that_cannot_be_answered_leaves_the_others(run: Run, tmp_path: Path) -> None:
    name = write(
        tmp_path / "in.jsonl",
        {"prompt": PROMPTS[0]},
        {"prompt": "Add 1 and 2. " * 100, "level": 4},
        {"prompt": [9999]},
        {"prompt": PROMPTS[1]},
    )
    status, out, err = run("--jsonl", name, "--json")
    first, long, outside, last = objects(out)
    assert (status, err) == (1, "")
    assert [first["text"], last["text"]] == alone(PROMPTS[:2])
    assert list(long) == ["id", "error", "hash", "level"]
    assert (long["id"], long["level"]) == (2, 4)
    assert long["error"].endswith("128 of them gen_length; takes 512 together")
    assert "holds token 9999; takes 0 to 187" in outside["error"]
    status, out, err = run("--jsonl", name)
    assert out == "==> 1 <==\n{}\n\n==> 4 <==\n{}\n".format(*alone(PROMPTS[:2]))
    assert [line.split(": ")[1] for line in err.splitlines()] == ["2", "3"]
    for _ in range(2):
        status, _, err = run("--jsonl", name, "--out", "out.jsonl")
        assert (status, err) == (1, "2 of 4 prompts answered, 2 failed in out.jsonl\n")


def test_more_that_cannot_be_answered_than_are_submitted_at_once(run: Run, tmp_path: Path) -> None:
    lines = [{"prompt": [9999]}] * 7 + [{"prompt": PROMPTS[0]}]
    status, out, _ = run("--jsonl", write(tmp_path / "in.jsonl", *lines), "--json", "--max-rows", "1")
    assert status == 1
    assert [("error" in answer) for answer in objects(out)] == [True] * 7 + [False]


GOOD = {"prompt": "Add 1 and 2."}
BAD_LINES: list[tuple[Any, str]] = [
    ("{", "no JSON: Expecting property name"),
    ("[1]", 'takes an object with "prompt" or "messages"'),
    ('{"prompt": "\\ud800"}', "surrogates not allowed"),
    ('{"prompt": "a", "level": NaN}', "Out of range float"),
    ({}, 'takes "prompt" or "messages", has neither'),
    ({"prompt": "a", "messages": []}, 'takes "prompt" or "messages", has prompt and messages'),
    ({"prompt": 3}, '"prompt" is 3; takes text, or a list of token ids'),
    ({"prompt": [1, True]}, '"prompt" is [1, true]; takes text'),
    ({"prompt": []}, '"prompt" is []; takes text'),
    ({"messages": [{"role": "user"}]}, '"messages" is [{"role": "user"}]; takes a list of {"role"'),
    ({"prompt": "a", "id": 1.5}, '"id" is 1.5; takes a string or a whole number'),
    ({"prompt": "a", "id": True}, '"id" is True; takes a string or a whole number'),
    ({"prompt": "a", "id": 1}, '"id" 1 is that of in.jsonl:1 as well'),
    ({"prompt": "a", "text": "b"}, '"text" is a name of the answer'),
    ({"prompt": "a", "max_tokens": 3, "gen_length": 3}, "names gen_length twice"),
    ({"prompt": "a", "threshold": 2}, "threshold=2; takes a number above 0"),
    ({"prompt": "a", "steps": 4, "factor": 1}, "takes only one of steps, threshold, factor and rule"),
    ({"prompt": "a", "gen_length": [4, 4]}, "gen_length=[4, 4]; takes one number"),
    ({"prompt": "a", "top_p": 0.9}, "llada takes neither; use temperature"),
    ({"prompt": "a", "eos_token_id": 5000}, "eos_token_id=5000; takes 0 to 187"),
]


@pytest.mark.parametrize("line, message", BAD_LINES, ids=[message[:24] for _, message in BAD_LINES])
def test_a_bad_line_is_named_before_anything_is_answered(
    run: Run, tmp_path: Path, line: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdllm_ext.commands.opening.load", lambda *a, **k: demo())
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    status, out, err = run("--jsonl", "in.jsonl", "--json")
    assert (status, out) == (2, "")
    assert err.startswith("fastdllm-ext generate: in.jsonl:3: "), err
    assert message in err


def test_bad_command_lines(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdllm_ext.commands.opening.load", lambda *a, **k: demo())
    (tmp_path / "latin").write_bytes("a\nCaf\xe9\n".encode("latin-1"))
    for arguments, message in (
        ([], "no prompt: stdin is empty"),
        (["--prompt", "a", "--file", "b"], "--prompt, --file: takes one of them"),
        (["--prompt", "a", "--lines"], "--lines, --prompt: takes --file, or stdin"),
        (["--file", "none"], "No such file or directory: 'none'"),
        (["--file", "latin", "--lines"], "latin:2: takes UTF-8, found the byte 0xe9"),
        (["--prompt", "a", "--restart"], "--restart: takes --out FILE"),
        (["--prompt", "a", "--max-rows", "0"], "--max-rows=0; takes 1 or more"),
        (["--prompt", "a", "--num-pages", "-1"], "--num-pages=-1; takes 1 or more"),
        (["--prompt", "a", "--threshold", "2"], "threshold=2.0; takes a number above 0"),
        (["--prompt", "a", "--refresh", "often"], "refresh='often'; takes 'block', or a number of blocks"),
        (["--prompt", "a", "--cache", "both"], "cache='both'; takes one of none, prefix, dual"),
        (["--prompt", "a", "--top-k", "5"], "llada takes neither; use temperature"),
        (["--prompt", "a", "--generation-config", "none"], "--generation-config none: "),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert err.startswith("fastdllm-ext generate: ")
        assert message in err
    with pytest.raises(SystemExit):
        run("--prompt", "a", "--json", "--out", "b")
    assert not (tmp_path / "b").exists()


def test_a_model_that_is_none(run: Run, tmp_path: Path) -> None:
    assert run("none such", "--prompt", "a")[2].startswith("fastdllm-ext generate: none such: ")
    folder = checkpoint(tmp_path, None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / folder / name).unlink()
    assert run(folder, "--prompt", "a")[2] == (
        "fastdllm-ext generate: model: has no tokenizer; takes a model with one\n"
    )


def test_whoever_reads_may_stop(tmp_path: Path) -> None:
    """A closed pipe is no error to complain about."""
    (tmp_path / "in").write_text("".join(prompt + "\n" for prompt in PROMPTS))
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = subprocess.Popen(
        [sys.executable, "-m", "fastdllm_ext", "generate", "--device", "cpu", "--file", "in", "--lines"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=buffered | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert program.stdout is not None
    program.stdout.close()
    assert program.stderr is not None
    err = program.stderr.read()
    assert program.wait(120) == 141
    assert err == ""
