from __future__ import annotations

import random
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.engine import Completion, Request
from test_generate import random_rows, random_settings, random_tiny
from tiny import EOS


class Stepped(fd.Engine):
    """An engine whose turns the test takes."""

    def _start(self) -> None:
        pass

    def turn(self) -> bool:
        """Whether there was something to do."""
        with self._lock:
            busy = self._let_in()
        if busy:
            self._scheduler.turn()
        return busy

    def run(self) -> None:
        while self.turn():
            pass

    def close(self, **arguments: Any) -> None:
        for request in self._open_requests():
            request.cancel()
        self.turn()


def alone(model: Any, prompt: torch.Tensor, settings: dict[str, Any]) -> fd.GenerationOutput:
    return fd.generate(model, [prompt], **settings)


def assert_same(found: Completion, wanted: fd.GenerationOutput) -> None:
    answer = wanted.answers()[0].tolist()
    assert list(found.tokens) == answer
    assert list(found.steps) == wanted.step_map[0, : len(answer)].tolist()
    assert found.nfe == int(wanted.nfe[0])
    assert found.prompt_length == int(wanted.prompt_lengths[0])
    torch.testing.assert_close(
        torch.tensor(found.confidence), wanted.confidence[0, : len(answer)], rtol=1e-3, atol=1e-4
    )
    assert (found.finish_reason == "stop") == (answer[-1] == EOS) or found.finish_reason == "length"


def random_request(rng: random.Random, family: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Any cache, rule and setting; sampled, guided, infilled."""
    settings = random_settings(rng, rng.randrange(3), 60, family == "dream")
    prompts, lengths = random_rows(rng, 1, settings["infill"])
    if rng.random() < 0.2:
        for name in ("steps", "threshold", "factor", "schedule", "eps", "remasking"):
            settings.pop(name, None)
        settings["rule"] = rng.choice(["klass", "credit", "wino", "frechet"])
        if settings["rule"] == "wino":
            settings["cfg_scale"] = 0.0
    if not settings["infill"]:
        settings["gen_length"] = lengths[0]
    settings |= {"temperature": rng.choice([0.0, 0.0, 0.7]), "seed": rng.randrange(2**40)}
    return prompts[0], settings


def check_updates(request: Request, completion: Completion) -> None:
    """Final tokens come once and in order; commits, those apart that were void, make the answer."""
    tokens: list[int] = []
    cells: dict[int, tuple[int, int]] = {}
    step = 0
    for update in request:
        tokens += update.tokens
        if update.restarted_at is not None:
            step = update.restarted_at
            assert not update.commits
            cells = {p: cell for p, cell in cells.items() if cell[1] < step}
            assert all(p in cells for p in range(len(tokens))), "what was final stays"
        for commit in update.commits:
            assert commit.step == step
            step += 1
            cells |= {p: (t, commit.step) for p, t in zip(commit.positions, commit.tokens, strict=True)}
    assert tuple(tokens) == completion.tokens
    assert step == completion.nfe
    for p, (token, filled_at) in enumerate(zip(completion.tokens, completion.steps, strict=True)):
        if filled_at >= 0:
            assert cells[p] == (token, filled_at)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("seed", range(24))
def test_a_request_gets_what_it_gets_alone(seed: int, family: str) -> None:
    """Random arrivals and cancellations, few pages, few positions a forward, and prompts that come again."""
    rng = random.Random(f"{family} {seed}")
    model = random_tiny(rng, seed, family)
    pool = [random_request(rng, family) for _ in range(12)]
    pool = [(p, s | {"seed": rng.randrange(99)}) for p, s in pool for _ in range(rng.choice([1, 1, 2, 4]))]
    rng.shuffle(pool)
    most = max(len(p) + (s.get("gen_length") or 0) for p, s in pool)
    engine = Stepped(
        model,
        num_pages=-(-2 * most // 32) + 90 * any(s.get("rule") == "wino" for _, s in pool) + rng.randrange(6),
        max_rows=rng.choice([2, 4, 16]),
        max_forward_tokens=rng.choice([1, 100, 300, 8192]),
        share_prompts=rng.random() < 0.8,
    )
    requests: list[tuple[Request, torch.Tensor, dict[str, Any]]] = []
    cancelled: set[Request] = set()
    left = list(pool)
    while left or engine.turn():
        for _ in range(rng.choice([0, 0, 1, 2, 6])):
            if left:
                prompt, settings = left.pop()
                requests.append((engine.submit(prompt, every_commit=True, **settings), prompt, settings))
        if left:
            engine.turn()
        open_ones = [request for request, _, _ in requests if not request.done]
        if open_ones and rng.random() < 0.1:
            cancelled.add(rng.choice(open_ones))
            rng.choice(open_ones).cancel()
    engine.run()
    assert engine.stats.free_pages == engine.stats.num_pages
    assert engine.stats.queued == engine.stats.running == 0
    ended = {request for request, _, _ in requests if request.cancelled}
    assert engine.stats.cancelled == len(ended)
    assert engine.stats.finished == len(requests) - len(ended)
    for request, prompt, settings in requests:
        if request in ended:
            with pytest.raises(CancelledError):
                request.result(0)
        else:
            completion = request.result(0)
            assert_same(completion, alone(model, prompt, settings))
            check_updates(request, completion)
