"""Models over several processes: the tokens of one, and what becomes of the others when one fails."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastdllm_ext as fd
from fastdllm_ext.cli import main
from fastdllm_ext.engine import Completion, EngineClosed
from fastdllm_ext.engine.team import Team, TeamFailed
from tiny import MASK, tiny_dream, tiny_llada

# Of every kind of state that processes must agree on: quotas, knobs, random numbers, memories, guidance.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps": 8, "cache": "none"},
    {"factor": 1.0, "cache": "prefix", "block_length": 4},
    {"temperature": 0.8, "seed": 5, "threshold": 0.4},
    {"rule": "klass"},
    {"rule": "wino"},
    {"cfg_scale": 0.5},
]


@pytest.fixture(autouse=True)
def _others_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))


def saved(model: nn.Module, where: Path) -> Path:
    fd.unpatch(model).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model."""
    return saved(tiny_llada(3), tmp_path_factory.mktemp("llada"))


def opener(folder: Path) -> Callable[[], Any]:
    return partial(fd.load, folder, device="cpu")


@contextmanager
def engine_of(opened: Callable[[], Any], size: int = 2, **arguments: Any) -> Iterator[fd.Engine]:
    team = Team(opened, size, "cpu")
    with fd.Engine(team.model, team.tokenizer, team=team, **arguments) as engine:
        yield engine


def prompts(count: int) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return [torch.randint(2, MASK, (3 + 5 * i % 23,)) for i in range(count)]


def assert_same(found: Completion, wanted: fd.GenerationOutput) -> None:
    """Sums over processes have another order: 1e-4 is a hundred times what float32 rounds off in one."""
    (answer,) = wanted.answers()
    assert list(found.tokens) == answer.tolist()
    assert found.confidence == pytest.approx(wanted.confidence[0, : len(answer)].tolist(), abs=1e-4)
    assert found.nfe == int(wanted.nfe[0])


@pytest.mark.parametrize("family, changes", [(tiny_llada, {"embedding_size": 65}), (tiny_dream, {})])
def test_tokens_are_those_of_one_process(family: Any, changes: Any, tmp_path: Path) -> None:
    """Of requests that share turns, some of which are given up, with few pages.

    Neither do the processes share the vocabulary evenly.
    """
    folder = saved(family(3, vocab_size=65, **changes), tmp_path)
    model, _ = opener(folder)()
    jobs = [(prompt, SETTINGS[i % len(SETTINGS)]) for i, prompt in enumerate(prompts(28))]
    with engine_of(opener(folder), num_pages=40, page_size=16) as engine:
        shapes = {tuple(p.to_local().shape) for p in engine.model.parameters() if hasattr(p, "to_local")}
        assert (32, 32) not in shapes
        assert (16, 32) in shapes
        requests = [
            (engine.submit(prompt, gen_length=16, **({"block_length": 8} | settings)), prompt, settings)
            for prompt, settings in jobs
        ]
        for request, _, _ in requests[3::9]:
            request.cancel()
        for request, prompt, settings in requests:
            if not request.cancelled:
                wanted = fd.generate(model, [prompt], gen_length=16, **({"block_length": 8} | settings))
                assert_same(request.result(60), wanted)
        assert engine.stats.free_pages == 40
        assert engine.stats.cancelled > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_ends_ends_the_engine(folder: Path) -> None:
    with engine_of(opener(folder)) as engine:
        (follower,) = engine._team._followers
        slow = engine.submit([5], gen_length=200, steps=200, cache="none", stop_on_eos=False)
        next(iter(slow))
        follower.process.kill()
        with pytest.raises(Exception, match=r"ended with status -9|[Cc]onnection"):
            slow.result(20)
        with pytest.raises(EngineClosed):
            engine.submit([5], gen_length=4)
        assert engine.failure is not None


def test_an_idle_process_that_ends_is_noticed(folder: Path) -> None:
    with engine_of(opener(folder)) as engine:
        engine._team._followers[0].process.kill()
        end = time.monotonic() + 20
        while engine.failure is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert isinstance(engine.failure, TeamFailed)
        assert "process 1 of the model ended with status -9" in str(engine.failure)


def test_a_failure_in_the_turn_of_a_process_is_the_team_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed here may not have failed there: going on could not keep them together."""
    with engine_of(opener(folder)) as engine:
        monkeypatch.setattr(fd.ops, "unmask", lambda *_: 1 / 0)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        request = engine.submit([5], gen_length=4)
        with pytest.raises(ZeroDivisionError):
            request.result(20)
        assert isinstance(engine.failure, ZeroDivisionError)


def test_bad_logits_end_their_request_alone(tmp_path: Path) -> None:
    """All processes see them, and go on."""
    model = tiny_llada(3)
    with torch.no_grad():
        model.model.transformer.wte.weight[7] = math.nan
    with engine_of(opener(saved(model, tmp_path)), num_pages=8) as engine:
        bad, good = engine.submit([7], gen_length=4), engine.submit([5], gen_length=4)
        with pytest.raises(ValueError, match=r"logits: NaN or infinite in rows .* first in the logits"):
            bad.result(20)
        good.result(20)
        engine.submit([6], gen_length=4).result(20)
        assert engine.failure is None
        assert engine.stats.free_pages == 8


def test_processes_end_with_their_engine(folder: Path) -> None:
    with engine_of(opener(folder)) as engine:
        (follower,) = engine._team._followers
        engine.submit([5], gen_length=4).result(20)
    assert follower.process.returncode == 0
    assert not torch.distributed.is_initialized()
    with engine_of(opener(folder)) as engine:  # and another can follow
        engine.submit([5], gen_length=4).result(20)


LEADER = """
import os, sys
from functools import partial
import fastdllm_ext as fd
from fastdllm_ext.engine.team import Team
team = Team(partial(fd.load, sys.argv[1], device="cpu"), 2, "cpu")
engine = fd.Engine(team.model, team=team)
request = engine.submit([5], gen_length=200, steps=200, cache="none", stop_on_eos=False)
next(iter(request))
if sys.argv[2] == "idle":
    request.result()
print(team._followers[0].process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["idle", pytest.param("busy", marks=pytest.mark.slow)])
def test_processes_end_when_their_leader_is_killed(folder: Path, when: str) -> None:
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, str(folder), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leader.stdout is not None
    follower = int(leader.stdout.readline())
    leader.kill()
    leader.wait()
    end = time.monotonic() + 20
    while is_running(follower):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_what_cannot_be_split(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size=3: the model has 4 heads, 4 of keys"):
        Team(opener(folder), 3, "cpu")
    tied = saved(tiny_llada(3, weight_tying=True), tmp_path / "tied")
    with pytest.raises(ValueError, match=r"size=2: the model's embedding is its head; takes 1"):
        Team(opener(tied), 2, "cpu")
    biased = saved(tiny_llada(3, include_bias=True), tmp_path / "biased")
    with pytest.raises(ValueError, match=r"size=2: what is summed over processes has a bias; takes 1"):
        Team(opener(biased), 2, "cpu")
    with pytest.raises(ValueError, match=r"size=2: takes a model that runtime='fused' takes"):
        Team(partial(with_modules, folder), 2, "cpu")
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match=r"size=2; takes \d, the GPUs that are here, at most"):
            Team(opener(folder), 2, "cuda")


def with_modules(folder: Path) -> tuple[nn.Module, Any]:
    model, tokenizer = fd.load(folder, device="cpu")
    return fd.patch(model, runtime="modules"), tokenizer


@pytest.mark.slow
def test_a_process_that_cannot_open_the_model(folder: Path) -> None:
    with pytest.raises(TeamFailed, match=r"process 1 of the model: OSError: no such checkpoint here"):
        Team(partial(fail_elsewhere, folder, os.getpid()), 2, "cpu")
    with pytest.raises(TeamFailed, match=r"process 1 of the model ended with status 3"):
        Team(partial(end_elsewhere, folder, os.getpid()), 2, "cpu")


def fail_elsewhere(folder: Path, here: int) -> Any:
    if os.getpid() != here:
        raise OSError("no such checkpoint here")
    return fd.load(folder, device="cpu")


def end_elsewhere(folder: Path, here: int) -> Any:
    if os.getpid() != here:
        os._exit(3)
    return fd.load(folder, device="cpu")


@pytest.mark.slow
def test_signals_are_the_leader_s(folder: Path) -> None:
    with engine_of(opener(folder)) as engine:
        (follower,) = engine._team._followers
        engine.submit([5], gen_length=4).result(20)
        for number in (signal.SIGINT, signal.SIGTERM):
            follower.process.send_signal(number)
        engine.submit([6], gen_length=4).result(20)
        assert follower.process.poll() is None


def test_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The bundled model has three heads, and an MLP that three do not share evenly."""
    ask = ["generate", "--prompt", "Add 4821 and 99.", "--dtype", "float32", "--device", "cpu"]
    assert main(ask) == 0
    alone = capfd.readouterr().out
    assert main([*ask, "--tensor-parallel-size", "3"]) == 0
    assert capfd.readouterr().out == alone != ""
    assert main([*ask, "--tensor-parallel-size", "0"]) == 2
    assert "--tensor-parallel-size=0; takes 1 or more" in capfd.readouterr().err
