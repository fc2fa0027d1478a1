from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fastdllm_ext.cli

CODE = """
import os, fastdllm_ext.cli, fastdllm_ext.threads
fastdllm_ext.threads.let_threads_sleep()
print(os.environ["OMP_WAIT_POLICY"], fastdllm_ext.cli.sys.argv)
"""


@pytest.mark.skipif(os.name != "posix", reason="a program cannot start anew in place")
@pytest.mark.parametrize("given, policy", [(None, "passive"), ("active", "active")])
def test_a_program_starts_anew_so_that_its_threads_sleep(given: str | None, policy: str) -> None:
    """With the same arguments, and once; what the user says counts."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    done = subprocess.run(
        [sys.executable, "-c", CODE, "serve", "--port", "0"], env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{policy} ['-c', 'serve', '--port', '0']\n", done.stderr


@pytest.mark.parametrize("argv, asked", [(["serve", "--port", "x"], True), (["env"], False)])
def test_only_a_server_asks_for_it(
    argv: list[str], asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(fastdllm_ext.cli, "let_threads_sleep", lambda: calls.append(True))
    monkeypatch.setattr(sys, "argv", ["fastdllm-ext", *argv])
    if asked:
        with pytest.raises(SystemExit):
            fastdllm_ext.cli.main()
    else:
        fastdllm_ext.cli.main()
    assert bool(calls) == asked
