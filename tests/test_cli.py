from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext import _C
from fastdllm_ext.cli import main
from fastdllm_ext.view import MASK, DenoisingView


def test_env_prints_what_was_compiled_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["cpu_isas"].split(", ") == _C.cpu_isas()
    assert lines["cuda_kernels"] == str(_C.cuda_built)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fd.collect_env()


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["env", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert "usage: fastdllm-ext" in capsys.readouterr().out


def test_bad_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["dmeo"], ["demo", "--prompts", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert main(["demo", "--prompts", "0"]) == 2
    assert "--prompts 0; takes 1 or more" in capsys.readouterr().err


def test_runs_as_a_module_and_by_its_name() -> None:
    script = os.path.join(os.path.dirname(sys.executable), "fastdllm-ext")
    for command in ([sys.executable, "-m", "fastdllm_ext"], [script]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"fastdllm_ext {fd.__version__}"


def test_an_instruction_set_can_be_chosen_from_outside() -> None:
    code = "from fastdllm_ext import _C; print(_C.cpu_isa())"
    for name, wanted in (("portable", "portable"), ("none such", _C.cpu_isas()[-1])):
        environment = os.environ | {"FASTDLLM_CPU_ISA": name}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted
    with pytest.raises(ValueError, match="'none such' is not available"):
        _C.set_cpu_isa("none such")


class Letters:
    """A tokenizer of single letters; token 0 ends the text, token 1 is a newline."""

    def decode(self, tokens: list[int]) -> str:
        return "".join("\n" if t == 1 else chr(95 + t) for t in tokens)


def frames(file: io.TextIOBase | None = None) -> str:
    out = file or io.StringIO()
    view = DenoisingView(Letters(), 6, eos_ids=(0,), file=out)  # type: ignore[arg-type]
    view.on_commit(fd.Commit(0, 0, [0, 4], [2, 0], [0.95, 0.6]))
    view.on_commit(fd.Commit(0, 1, [1, 2, 3], [1, 3, 4], [0.3, 0.99, 0.99]))
    view.end()
    return out.getvalue() if isinstance(out, io.StringIO) else ""


def test_denoising_view_draws_a_frame_a_step() -> None:
    first, second = frames().split("  step ")[1:]
    assert first.splitlines()[0].split() == ["1", "[████████", "]", "2/6", "tokens"]
    assert first.splitlines()[1] == "    a" + 3 * MASK + "∎" + MASK
    assert second.splitlines()[0].split() == ["2", f"[{24 * '█'}]", "5/5", "tokens"], (
        "all that lies before EOS"
    )
    assert second.splitlines()[1] == "    a⏎bc∎"


def test_denoising_view_redraws_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdllm_ext.view.FRAME_SECONDS", 0.0)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        frames(terminal)
        os.set_blocking(ours, False)
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(ours, 10000):
                parts.append(part)
    os.close(ours)
    drawn = b"".join(parts).decode()
    assert "\x1b[2F\x1b[J" in drawn, "the second frame takes the place of the first"
    assert "\x1b[32ma" in drawn, "green for a confident token"
    assert "\x1b[31m⏎" in drawn, "red for a doubtful one"
