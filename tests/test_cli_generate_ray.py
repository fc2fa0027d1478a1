"""`fastdllm-ext generate --ray`: the answers of one engine, whatever becomes of a replica."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastdllm_ext.cli import main
from fastdllm_ext.commands import batch
from fastdllm_ext.commands.batch import Replica, task_size
from fastdllm_ext.commands.jobs import Job
from fastdllm_ext.commands.prompts import Asked
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.demo_tasks import held_out
from terminal import Terminal, without_controls
from test_cli_generate import objects, timeless, write

ray = pytest.importorskip("ray", reason="Ray is not installed")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # of which the replicas know nothing

PROMPTS = [problem.prompt for problem in held_out(60, seed=7)]
SAMPLED = ("--temperature", "2", "--seed", "5", "--gen-length", "48")
PATIENCE = 120.0

Run = Callable[..., tuple[int, str, str]]

# A cluster, for as long as its stdin is open.
CLUSTER = """
import sys, ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    program = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | settings,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    yield program.stdout.readline().strip()
    program.stdin.close()
    program.wait(PATIENCE)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`fastdllm-ext generate ARGUMENTS`: exit status, stdout, stderr; what Ray's libraries print, too."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(["generate", "--device", "cpu", *arguments])
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return run


def watched(folder: Path, held: tuple[Any, ...] = ()) -> type[Replica]:
    """Replicas that write down in ``folder`` who decodes what, and keep some answers until it has `go`."""

    class Watched(Replica):
        async def __call__(self, row: dict[str, Any]) -> dict[str, str]:
            told = await super().__call__(row)
            ids = [answer["id"] for answer in json.loads(told["answers"])]
            with open(folder / "decoded", "a", encoding="utf-8") as file:
                file.write(json.dumps([os.getpid(), ids]) + "\n")
            while set(held).intersection(ids) and not (folder / "go").exists():
                await asyncio.sleep(0.02)
            return told

    return Watched


def decoded(folder: Path) -> list[tuple[int, list[Any]]]:
    file = folder / "decoded"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [(pid, ids) for pid, ids in map(json.loads, whole.splitlines())]


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def prompts_of(folder: Path) -> Path:
    """Of unequal lengths, some with settings of their own, some that cannot be answered."""
    lines: list[dict[str, Any]] = [{"prompt": prompt, "n": n} for n, prompt in enumerate(PROMPTS)]
    lines[3] |= {"temperature": 0.0, "gen_length": 128}
    lines[4] |= {"seed": 8, "rule": "klass:kl=0.1"}
    lines[5] |= {"messages": [{"role": "user", "content": lines[5].pop("prompt")}]}
    lines[6] |= {"prompt": [9999]}
    lines[7] |= {"prompt": PROMPTS[7] * 50}
    for n in range(10, 20):
        lines[n] |= {"gen_length": 8 * (n - 8), "block_length": 8, "steps": 4 * (n - 8)}
    path = folder / "in.jsonl"
    write(path, *lines)
    return path


@dataclass
class Story:
    """A run in which a replica was killed under load.

    Attributes:
        prompts, out: its files.
        early: answers that were in ``out`` while others were kept back.
        killed: which replica it was.
        decoded: by whom, what.
        one_engine: the file of a run without Ray.
    """

    prompts: Path
    out: Path
    status: int
    early: int
    killed: int
    decoded: list[tuple[int, list[Any]]]
    one_engine: Path


@pytest.fixture(scope="module")
def story(address: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    prompts, out, one = prompts_of(folder), folder / "out.jsonl", folder / "one.jsonl"
    options = ("generate", "--device", "cpu", "--jsonl", str(prompts), "--quiet", *SAMPLED)
    assert main([*options, "--out", str(one)]) == 1
    held = tuple(range(21, 61))  # more than one replica may have in hand
    early, killed = 0, 0

    def kill() -> None:
        nonlocal early, killed
        try:
            wait_until(lambda: len({pid for pid, ids in decoded(folder) if held[0] <= ids[0]}) == 2)
            wait_until(lambda: len(lines_of(out)) >= 10)
            early, killed = len(lines_of(out)), decoded(folder)[-1][0]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: len({pid for pid, _ in decoded(folder)}) == 3)
        finally:
            (folder / "go").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "Replica", watched(folder, held))
        killer = threading.Thread(target=kill)
        killer.start()
        status = main([*options, "--out", str(out), "--ray", "--ray-address", address, "--replicas", "2"])
        killer.join()
    return Story(prompts, out, status, early, killed, decoded(folder), one)


def test_replicas_answer_as_one_engine_does(story: Story) -> None:
    """Sampled too, with settings of lines and errors among them, and though one of two was killed."""
    answers = objects(story.out.read_text())
    assert timeless(answers) == timeless(objects(story.one_engine.read_text()))
    assert [answer["id"] for answer in answers if "error" in answer] == [7, 8]
    assert story.status == 1
    assert len({answer["id"] for answer in answers}) == len(answers) == 60
    about = [path.with_name(path.name + ".run.json").read_text() for path in (story.out, story.one_engine)]
    assert about[0] == about[1]


def test_answers_are_on_disk_while_others_are_decoded(story: Story) -> None:
    assert 10 <= story.early <= 20


def test_a_replica_that_dies_is_replaced(story: Story) -> None:
    """What it had in hand was decoded again, and told once."""
    by_pid: dict[int, set[Any]] = {}
    for pid, ids in story.decoded:
        by_pid.setdefault(pid, set()).update(ids)
    assert len(by_pid) == 3
    lost = by_pid.pop(story.killed) & set(range(21, 61))
    assert lost
    assert lost <= set.union(*by_pid.values())


@pytest.mark.slow
def test_a_run_goes_on_with_ray_and_without(
    story: Story, run: Run, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--jsonl", str(story.prompts), *SAMPLED)
    wanted = timeless(objects(story.one_engine.read_text()))
    said = "58 of 60 prompts answered, 2 failed in {}\n"
    monkeypatch.setattr(batch, "Replica", watched(tmp_path))
    with_ray = ("--ray", "--ray-address", address, "--replicas", "1")
    for before, more in ((story.one_engine, with_ray), (story.out, ())):
        out = tmp_path / before.name
        kept = before.read_bytes().splitlines(keepends=True)[:50]
        out.write_bytes(b"".join(kept)[:-9])
        about = before.name + ".run.json"
        (tmp_path / about).write_bytes(before.with_name(about).read_bytes())
        assert run(*options, "--out", str(out), *more) == (1, "", said.format(out))
        assert timeless(objects(out.read_text())) == wanted
        assert out.read_bytes().startswith(b"".join(kept[:49]))
    assert len(decoded(tmp_path)) == 11, "what was answered is not asked again"
    status, _, err = run(*options, "--out", str(out), "--dtype", "bfloat16", *with_ray)
    assert status == 2
    assert "is of another run: dtype was 'float32', is 'bfloat16'" in err


@pytest.mark.slow
def test_answers_are_printed_in_the_order_of_the_prompts(
    run: Run, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, which is the last to come, is waited for."""
    monkeypatch.setattr(batch, "Replica", watched(tmp_path, (1,)))
    opener = threading.Thread(
        target=lambda: (wait_until(lambda: len(decoded(tmp_path)) == 5), (tmp_path / "go").touch())
    )
    opener.start()
    prompts = [option for prompt in PROMPTS[:5] for option in ("--prompt", prompt)]
    status, out, err = run(*prompts, "--json", "--ray", "--ray-address", address)
    opener.join()
    assert (status, err) == (0, "")
    assert [answer["id"] for answer in objects(out)] == [1, 2, 3, 4, 5]
    assert timeless(objects(out)) == timeless(objects(run(*prompts, "--json")[1]))


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_a_record(run: Run, address: str, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out.jsonl", prompts_of(tmp_path)
    options = ("--jsonl", str(prompts), "--out", str(out), *SAMPLED, "--quiet")
    few_at_once = ("--max-rows", "2", "--ray", "--ray-address", address)
    program = subprocess.Popen(
        [sys.executable, "-m", "fastdllm_ext", "generate", "--device", "cpu", *options, *few_at_once],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: len(lines_of(out)) >= 5)
    program.kill()
    program.wait()
    assert len(lines_of(out)) < 60
    assert run(*options) == (1, "", "")
    answers = objects(out.read_text())
    assert sorted(answer["id"] for answer in answers) == list(range(1, 61))


@pytest.mark.slow
def test_ctrl_c_ends_the_cluster_of_this_machine(run: Run, tmp_path: Path) -> None:
    """On a terminal, under the progress bar, with nothing of Ray's on it; the rest comes without Ray."""
    name = write(tmp_path / "in.jsonl", *({"prompt": f"Add {n} and 77."} for n in range(100, 400)))
    options = ("--jsonl", name, "--out", "out.jsonl", "--max-rows", "1", "--gen-length", "16")
    slow = ("--cache", "none", "--steps", "16")  # longer than it takes to see it and to stop it
    with Terminal("generate", "--device", "cpu", *options, *slow, "--ray", cwd=tmp_path) as terminal:
        terminal.wait_for("1/300 [")
        terminal.wait_for("tokens/s")
        mine = set(descendants(terminal.program.pid))
        assert mine
        terminal.send("\x03")
        terminal.wait_for(" of 300 prompts answered in out.jsonl\r\nThe same command goes on.")
        assert terminal.status() == 130
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine))
    printed = without_controls(terminal.output)
    for word in ("Traceback", "ray", "Ray", "WARNING", "INFO"):
        assert word not in printed
    said = int(printed.split("stopped: ")[1].split()[0])
    assert 0 < said == len(lines_of(tmp_path / "out.jsonl")) < 300


def descendants(pid: int) -> Iterator[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in map(int, children):
        yield child
        yield from descendants(child)


# --- What cannot be ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_cannot_be_opened(run: Run, address: str, tmp_path: Path) -> None:
    """A line, and the same as without Ray; also where it is the replicas alone that cannot."""
    on_ray = ("--prompt", "a", "--ray", "--ray-address", address)
    assert run("none such", *on_ray) == run("none such", "--prompt", "a")
    assert run(*on_ray, "--rule", "none") == run("--prompt", "a", "--rule", "none")
    status, out, err = run(*on_ray, "--num-pages", str(2**40))
    assert (status, out) == (2, "")
    assert err.startswith("fastdllm-ext generate: a replica: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_process_that_ends_again_and_again(run: Run, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mortal(Replica):
        def __init__(self, _: Any) -> None:
            os._exit(1)

    monkeypatch.setattr(batch, "Replica", Mortal)
    monkeypatch.setattr(batch, "RESTARTS", 1)
    status, out, err = run("--prompt", "a", "--ray", "--ray-address", address)
    assert (status, out) == (2, "")
    assert "fastdllm-ext generate: a replica: its process has ended too often; Ray's logs say why\n" in err
    assert "Traceback" not in err


def test_arguments_in_error(run: Run) -> None:
    for arguments, message in (
        (["--replicas", "2"], "--replicas=2; takes --ray too"),
        (["--ray", "--replicas", "0"], "--replicas=0; takes 1 or more"),
        (["--ray", "--max-rows", "0"], "--max-rows=0; takes 1 or more"),
        (["--ray", "--num-pages", "-1"], "--num-pages=-1; takes 1 or more"),
    ):
        assert run("--prompt", "a", *arguments) == (2, "", f"fastdllm-ext generate: {message}\n")


def test_without_ray(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    needs = "fastdllm-ext generate: --ray needs Ray: pip install 'fastdllm_ext[ray]'\n"
    assert run("--prompt", "a", "--ray") == (2, "", needs)
    status, out, err = run("--prompt", PROMPTS[0])
    assert (status, err) == (0, "")
    assert out


def test_the_command_does_not_import_ray() -> None:
    code = "import sys, fastdllm_ext.commands.generate; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_job_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes twice, for a replica has died in between; and what does not come at all is missed."""
    jobs = [Job(Asked(f"prompt {n}", n, "a"), GenerationConfig(), n) for n in (1, 2, 3)]
    rows = [{"answers": json.dumps([{"id": n} for n in ids]), "failure": ""} for ids in ([2], [2, 1])]
    monkeypatch.setattr(batch, "_answered", lambda *_: iter(rows))
    told = batch.answers(Namespace(), jobs)
    assert [next(told)["id"], next(told)["id"]] == [2, 1]
    with pytest.raises(ChildProcessError, match="no answer to 1 prompts"):
        next(told)


@pytest.mark.parametrize(
    "jobs, replicas, max_rows, size",
    [(1, 1, 64, 1), (255, 2, 64, 1), (511, 2, 64, 1), (512, 2, 64, 2), (10**6, 2, 64, 8), (10**6, 8, 1, 1)],
)
def test_tasks_are_small_where_jobs_are_few(jobs: int, replicas: int, max_rows: int, size: int) -> None:
    assert task_size(jobs, replicas, max_rows) == size
