from __future__ import annotations

import asyncio
import random
import threading
import weakref
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.engine import Completion, EngineClosed, QueueFull, Request, RequestTooLong, Update
from stepped import Stepped
from test_block import pretend
from test_generate import random_rows, random_settings, random_tiny
from test_memory import without_collector
from tiny import EOS, MASK, VOCAB, random_prompt, tiny_dream, tiny_llada


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
@pytest.mark.parametrize("captured", [False, True], ids=["steps", "blocks"])
@pytest.mark.parametrize("seed", range(16))
def test_a_request_gets_what_it_gets_alone(
    seed: int, captured: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random arrivals and cancellations, few pages, few positions a forward, and prompts that come again.

    A turn takes one step; or, on a device that pretends, all steps of a block where it can.
    """
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
    wanted = [alone(model, prompt, settings) for prompt, settings in pool]
    if captured:
        pretend(monkeypatch)
    requests: list[Request] = []
    left = list(pool)
    while left or engine.turn():
        for _ in range(rng.choice([0, 0, 1, 2, 6])):
            if left:
                prompt, settings = left.pop(0)
                requests.append(engine.submit(prompt, every_commit=True, **settings))
        if left:
            engine.turn()
        open_ones = [request for request in requests if not request.done]
        if open_ones and rng.random() < 0.1:
            rng.choice(open_ones).cancel()
    engine.run()
    assert engine.stats.free_pages == engine.stats.num_pages
    assert engine.stats.queued == engine.stats.running == 0
    ended = [request for request in requests if request.cancelled]
    assert engine.stats.cancelled == len(ended)
    assert engine.stats.finished == len(requests) - len(ended)
    for request, output in zip(requests, wanted, strict=True):
        if request.cancelled:
            with pytest.raises(CancelledError):
                request.result(0)
        else:
            assert_same(request.result(0), output)
            check_updates(request, request.result(0))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_identical_prompts_take_their_first_forward_once(cache: str) -> None:
    """And only those: another prompt, length or cache is another forward. Their samples are their own."""
    model, prompt = tiny_llada(3), torch.arange(5, 25)
    settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, "temperature": 1.0, "seed": 5}
    settings["cache"] = cache
    engine = Stepped(model, num_pages=200)
    requests = [engine.submit(prompt, stream=b, **settings) for b in range(6)]
    others = [
        engine.submit(prompt[:-1], **settings),
        engine.submit(prompt, **settings | {"gen_length": 23}),
        engine.submit(prompt, **settings | {"suffix": 4}),
    ]
    engine.turn()
    assert engine.stats.shared_refreshes == 5
    assert engine.stats.free_pages == 200 - 2 - 3 * 2, "those six share their pages"
    engine.run()
    assert engine.stats.shared_refreshes == 5
    wanted = fd.generate(model, [prompt] * 6, **settings)
    for b, request in enumerate(requests):
        assert request.result(0).tokens == tuple(wanted.answers()[b].tolist())
    assert len({request.result(0).tokens for request in requests}) == 6
    assert_same(others[0].result(0), alone(model, prompt[:-1], settings))
    assert_same(others[2].result(0), alone(model, prompt, settings | {"suffix": 4}))


def test_rows_that_are_served_take_neither_pages_nor_positions() -> None:
    """And one that only has the same prompt needs both."""
    model, prompt = tiny_llada(3), torch.arange(5, 25)
    settings: dict[str, Any] = {"gen_length": 40, "block_length": 8, "steps": 40, "stop_on_eos": False}
    engine = Stepped(model, num_pages=3, max_forward_tokens=100)  # each has 2 pages and 60 positions
    requests = [engine.submit(prompt, **settings) for _ in range(3)]
    other = engine.submit(prompt, **settings | {"suffix": 4})
    engine.turn()
    assert [request.row.nfe for request in requests] == [1, 1, 1]
    assert (engine.stats.running, engine.stats.queued) == (3, 1)
    engine.run()
    for request in requests:
        assert_same(request.result(0), alone(model, prompt, settings))
    assert_same(other.result(0), alone(model, prompt, settings | {"suffix": 4}))


def test_one_that_would_have_been_served_goes_on_when_the_other_leaves() -> None:
    model, prompt = tiny_llada(3), torch.arange(5, 25)
    engine = Stepped(model, num_pages=20)
    settings: dict[str, Any] = {"gen_length": 40, "block_length": 8}
    first, second = (engine.submit(prompt, **settings) for _ in range(2))
    with engine._lock:
        engine._let_in()
    first.cancel()
    engine.run()
    assert engine.stats.shared_refreshes == 0
    assert_same(second.result(0), alone(model, prompt, settings))


def test_put_aside_and_continued() -> None:
    """Two requests share pages, and there are too few when they part: the later one waits, and is exact."""
    model, prompt = tiny_llada(4), random_prompt(random.Random(0), 60, 60)
    settings: dict[str, Any] = {"gen_length": 60, "block_length": 20, "steps": 30, "stop_on_eos": False}
    settings |= {"temperature": 0.7, "seed": 3}
    engine = Stepped(model, num_pages=5)  # one needs 4
    first, second = (engine.submit(prompt, stream=b, every_commit=True, **settings) for b in range(2))
    engine.run()
    assert engine.stats.put_aside >= 1
    wanted = fd.generate(model, [prompt] * 2, **settings)
    for b, request in enumerate((first, second)):
        assert request.result(0).tokens == tuple(wanted.answers()[b].tolist())
        assert request.result(0).nfe == int(wanted.nfe[b])
    assert first.result(0).seconds < second.result(0).seconds
    restarted = [update.restarted_at for update in second if update.restarted_at is not None]
    assert restarted
    assert all(update.restarted_at is None for update in first), "the one that came first goes on"
    assert engine.stats.row_forwards > engine.stats.nfe, "what was lost is counted"


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("seed", range(24))
def test_a_row_can_be_put_aside_at_any_turn(seed: int, family: str) -> None:
    """In the middle of a block, between blocks, and between refreshes that are several blocks apart."""
    rng = random.Random(f"{family} {seed}")
    model = random_tiny(rng, seed, family)
    prompt, settings = random_request(rng, family)
    if settings["cache"] != "none":
        settings |= {"refresh": rng.choice([1, 2, 3]), "block_length": rng.choice([3, 8])}
    wanted = alone(model, prompt, settings)
    engine = Stepped(model, num_pages=200)
    request = engine.submit(prompt, every_commit=True, **settings)
    left = 6
    while engine.turn():
        if left and not request.done and rng.random() < 0.3:
            engine._scheduler._put_aside(request)
            left -= 1
    assert_same(request.result(0), wanted)
    check_updates(request, request.result(0))
    assert engine.stats.free_pages == 200


def test_none_overtakes_a_large_request() -> None:
    """A request that needs all pages runs once those before it are done, however many small ones come."""
    model, rng = tiny_llada(0), random.Random(1)
    engine = Stepped(model, num_pages=8)
    settings: dict[str, Any] = {"block_length": 8, "steps": 6, "stop_on_eos": False}
    small: list[Request] = [
        engine.submit(random_prompt(rng, 20, 20), gen_length=24, **settings) for _ in range(3)
    ]
    engine.turn()
    large = engine.submit(random_prompt(rng, 100, 100), gen_length=140, **settings)
    order: list[Request] = []
    while not large.done:
        small.append(engine.submit(random_prompt(rng, 20, 20), gen_length=24, **settings))
        engine.turn()
        order += [r for r in (*small, large) if r.done and r not in order]
    assert order == [*small[:3], large]
    engine.run()
    assert engine.stats.finished == len(small) + 1


def test_positions_of_a_forward_are_bounded() -> None:
    """Rows whose refresh does not fit wait; the oldest always goes on."""
    model, rng = tiny_llada(0), random.Random(2)
    prompts = [random_prompt(rng, 40, 40) for _ in range(6)]
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "steps": 8, "stop_on_eos": False}
    engine = Stepped(model, num_pages=100, max_forward_tokens=150)
    requests = [engine.submit(prompt, **settings) for prompt in prompts]
    engine.turn()
    assert [request.row.nfe for request in requests] == [1, 1, 0, 0, 0, 0], "56 positions each"
    engine.turn()
    assert [request.row.nfe for request in requests] == [2, 2, 1, 1, 0, 0], "two block steps, two refreshes"
    engine.run()
    for prompt, request in zip(prompts, requests, strict=True):
        assert_same(request.result(0), alone(model, prompt, settings))
    narrow = Stepped(model, num_pages=100, max_forward_tokens=1)
    last = [narrow.submit(prompt, **settings) for prompt in prompts][-1]
    narrow.run()
    assert_same(last.result(0), alone(model, prompts[-1], settings))
    assert narrow.stats.rows_per_forward == 1


def test_bad_logits_end_the_rows_that_have_them() -> None:
    """One request whose prompt meets a NaN in the embedding; the others do not notice."""
    model = tiny_llada(5)
    good, bad = torch.arange(5, 15), torch.arange(20, 30)
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "steps": 4, "stop_on_eos": False}
    wanted = alone(model, good, settings)
    assert 25 not in wanted.sequences
    with torch.no_grad():
        model.get_input_embeddings().weight[25] = torch.nan
    engine = Stepped(model, num_pages=4)
    requests = [engine.submit(prompt, **settings) for prompt in (bad, good, bad, good, good)]
    engine.run()
    for request, prompt in zip(requests, (bad, good, bad, good, good), strict=True):
        if prompt is bad:
            with pytest.raises(ValueError, match=r"logits: NaN or infinite .* first in the output of"):
                request.result(0)
        else:
            assert_same(request.result(0), wanted)
    stats = engine.stats
    assert (stats.finished, stats.failed, stats.free_pages) == (3, 2, 4)


def test_a_forward_that_fails_ends_its_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llada(5)
    engine = Stepped(model, num_pages=20)
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8}
    lost = [engine.submit(torch.arange(5, 15), **settings) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(fd.ops, "unmask", lambda *_: 1 / 0)
        engine.turn()
    for request in lost:
        with pytest.raises(ZeroDivisionError):
            request.result(0)
    after = engine.submit(torch.arange(5, 15), **settings)
    engine.run()
    assert_same(after.result(0), alone(model, torch.arange(5, 15), settings))
    assert (engine.stats.failed, engine.stats.finished, engine.stats.free_pages) == (2, 1, 20)


def test_a_tokenizer_that_fails_ends_its_request() -> None:
    class Tokenizer:
        def decode(self, tokens: list[int], **_: Any) -> str:
            if len(tokens) == 3:
                raise KeyError("three")
            return "text"

    engine = Stepped(tiny_llada(1), Tokenizer(), num_pages=4)  # type: ignore[arg-type]
    requests = [engine.submit([5], gen_length=n, stop_on_eos=False) for n in (3, 4)]
    engine.run()
    with pytest.raises(KeyError, match="three"):
        requests[0].result(0)
    assert requests[1].result(0).text == "text"
    assert (engine.stats.failed, engine.stats.finished, engine.stats.free_pages) == (1, 1, 4)


@pytest.mark.parametrize("family", [tiny_llada, tiny_dream])
def test_threads_submit_wait_and_cancel(family: Any) -> None:
    """From 8 threads at once, with the engine's own thread; every answer is the request's own."""
    model = family(1)
    rng = random.Random(4)
    prompts = [random_prompt(rng, 3, 40) for _ in range(40)]
    settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, "threshold": 0.3}
    wanted = [alone(model, prompt, settings) for prompt in prompts]
    wrong: list[BaseException] = []

    def client(engine: fd.Engine, number: int) -> None:
        try:
            for b in range(number, len(prompts), 8):
                request = engine.submit(prompts[b], every_commit=bool(b % 2), **settings)
                if b % 5 == 0:
                    request.cancel()
                    with pytest.raises(CancelledError):
                        list(request)
                    continue
                tokens = [token for update in request for token in update.tokens]
                assert tuple(tokens) == request.result().tokens
                assert_same(request.result(), wanted[b])
        except BaseException as error:
            wrong.append(error)

    with fd.Engine(model, num_pages=12, max_rows=4) as engine:
        threads = [threading.Thread(target=client, args=(engine, i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        engine.close(drain=True)
        assert not wrong
        stats = engine.stats
        assert (stats.finished, stats.cancelled, stats.free_pages) == (32, 8, 12)


def test_async_updates_and_their_end() -> None:
    model, prompt = tiny_llada(1), torch.arange(5, 15)
    settings: dict[str, Any] = {"gen_length": 40, "block_length": 8, "steps": 40, "stop_on_eos": False}
    wanted = alone(model, prompt, settings).answers()[0].tolist()

    async def read(engine: fd.Engine) -> list[Update]:
        return [update async for update in engine.stream(prompt, **settings)]

    async def leave(engine: fd.Engine) -> None:
        stream = engine.stream(prompt, **settings)
        assert len((await anext(stream)).tokens) == 8
        await stream.aclose()

    async def main() -> None:
        with fd.Engine(model, num_pages=40) as engine:
            for updates in await asyncio.gather(*(read(engine) for _ in range(5))):
                assert [len(update.tokens) for update in updates] == [8] * 5
                assert [token for update in updates for token in update.tokens] == wanted
                assert [update.nfe for update in updates] == [8, 16, 24, 32, 40]
                assert [u.seconds for u in updates] == sorted(u.seconds for u in updates)
            await leave(engine)
            request = engine.submit(prompt, **settings)
            request.cancel()
            with pytest.raises(CancelledError):
                [update async for update in request]
            engine.close(drain=True)
            assert engine.stats.cancelled == 2
            assert engine.stats.free_pages == 40

    asyncio.run(main())


def test_a_request_is_iterated_over_once() -> None:
    with fd.Engine(tiny_llada(1), num_pages=4) as engine:
        request = engine.submit([5, 6], gen_length=4)
        assert sum(len(update.tokens) for update in request) == len(request.result().tokens)
        with pytest.raises(RuntimeError, match="iterated over already"):
            next(iter(request))


def test_generate_keeps_the_order_and_the_streams() -> None:
    """Prompt b gets what row b of a generation gets; a generator is read no further than needed."""
    model, rng = tiny_dream(2), random.Random(3)
    prompts = [random_prompt(rng, 3, 40) for _ in range(30)]
    settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, "temperature": 1.0, "seed": 7}
    wanted = fd.generate(model, prompts, **settings)
    read = []

    def some() -> Any:
        for b, prompt in enumerate(prompts):
            read.append(b)
            yield prompt

    with fd.Engine(model, max_rows=3, max_queue=2, num_pages=20) as engine:
        found = engine.generate(some(), progress=False, **settings)
        assert [list(c.tokens) for c in found] == [answer.tolist() for answer in wanted.answers()]
        assert [c.nfe for c in found] == wanted.nfe.tolist()
        assert all(0 <= c.queue_seconds <= c.first_block_seconds <= c.seconds for c in found)
        assert all(sum(c.block_seconds) == pytest.approx(c.seconds) for c in found)
        read.clear()
        broken = [*prompts[:10], torch.tensor([VOCAB]), *prompts[10:]]
        with pytest.raises(ValueError, match=f"token {VOCAB}"):
            engine.generate((read.append(1) or p for p in broken), progress=False, **settings)
        assert len(read) == 11
        engine.close(drain=True)
        assert engine.stats.free_pages == 20


def test_strings_and_texts() -> None:
    model, tokenizer = fd.load(fd.demo_model_path())
    prompts = ["Add 1766 and 31.", "Elif has 201 nails and finds 946 more. How many nails now?"]
    with fd.Engine(model, tokenizer) as engine:
        first, second = engine.generate(prompts, progress=False)
        assert first.text is not None
        assert first.text.endswith("Sum: 1797")
        assert first.finish_reason == "stop"
        assert second.text == "1+6+0=07\n0+4+0=04\n2+9+0=11\nSum: 1147"
        assert first.tokens_per_forward == len(first.tokens) / first.nfe
        assert engine.submit(engine.encode(prompts[0]), gen_length=4).result().finish_reason == "length"
    with fd.Engine(model) as engine, pytest.raises(ValueError, match="no tokenizer"):
        engine.generate(prompts)


def test_queue_and_close() -> None:
    model, prompt = tiny_llada(1), [5, 6, 7]
    engine = Stepped(model, num_pages=1, max_queue=2)
    running = engine.submit(prompt, gen_length=20)
    with engine._lock:
        engine._let_in()
    waiting = [engine.submit(prompt, gen_length=21) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait; max_queue=2"):
        engine.submit(prompt, gen_length=20)
    assert (engine.stats.queued, engine.stats.running) == (2, 1)
    waiting[0].cancel()
    engine.turn()
    engine.submit(prompt, gen_length=20)
    engine.run()
    assert not running.cancelled
    assert engine.stats.finished == 3
    real = fd.Engine(model, num_pages=4)
    request = real.submit(prompt, gen_length=100)
    real.close(drain=True)
    assert request.result(0).prompt_length == 3
    with pytest.raises(EngineClosed):
        real.submit(prompt, gen_length=9)
    real.close()
    hasty = fd.Engine(model, num_pages=4)
    request = hasty.submit(prompt, gen_length=100, steps=100, cache="none", stop_on_eos=False)
    hasty.close()
    assert request.cancelled
    assert hasty.stats.free_pages == 4


def test_a_fault_of_the_engine_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fd.Engine(tiny_llada(1), num_pages=4)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._scheduler, "turn", lambda: 1 / 0)
    request = engine.submit([5, 6], gen_length=9)
    with pytest.raises(ZeroDivisionError):
        request.result(10)
    with pytest.raises(EngineClosed) as closed:
        engine.submit([5, 6], gen_length=9)
    assert isinstance(engine.failure, ZeroDivisionError)
    assert closed.value.__cause__ is engine.failure
    engine.close()


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, r"input_ids holds 1.5; takes ints", {"input_ids": [1.5]}),
        (TypeError, r"input_ids holds 'a'", {"input_ids": "abc"}),
        (ValueError, r"holds token 64; takes 0 to 63", {"input_ids": [64]}),
        (ValueError, r"holds token 10{30}; takes those of the vocabulary", {"input_ids": [10**30]}),
        (ValueError, r"takes 1-D", {"input_ids": torch.zeros((2, 2), dtype=torch.int64)}),
        (TypeError, r"dtype torch.float32; takes torch.int64", {"input_ids": torch.zeros(2)}),
        (ValueError, r"holds the mask token", {"input_ids": [5, MASK]}),
        (ValueError, r"gen_length=0; takes 1 or more", {"gen_length": 0}),
        (TypeError, r"unknown argument 'lenght'", {"lenght": 3}),
        (ValueError, r"stream=-1", {"stream": -1}),
        (
            RequestTooLong,
            r"131 positions, 128 of them gen_length; takes 128 together",
            {"input_ids": [5, 6, 7]},
        ),
        (RequestTooLong, r"needs 6 pages; num_pages=4", {"cfg_scale": 1.0, "gen_length": 65}),
        (ValueError, r"top_p=0.5, top_k=None: llada takes neither", {"top_p": 0.5, "gen_length": 9}),
    ],
)
def test_bad_requests(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    engine = Stepped(tiny_llada(1), num_pages=4)
    with pytest.raises(error, match=message):
        engine.submit(**{"input_ids": [5]} | arguments)
    assert engine.stats.queued == 0


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, "num_pages=0", {"num_pages": 0}),
        (TypeError, "max_rows='2'", {"max_rows": "2"}),
        (ValueError, "max_queue=-1; takes 0 or more", {"max_queue": -1}),
        (ValueError, "max_forward_tokens=0", {"max_forward_tokens": 0}),
        (ValueError, r"page_size=24; takes one of \(16, 32, 64\)", {"page_size": 24}),
    ],
)
def test_bad_engines(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fd.Engine(tiny_llada(1), **arguments)


def test_only_patched_models() -> None:
    with pytest.raises(ValueError, match="patch"):
        fd.Engine(tiny_llada(1, patched=False))


def test_the_model_is_as_it_was() -> None:
    """An engine evaluates a model that is in training; closed, it trains again."""
    model = tiny_llada(1).train()
    with fd.Engine(model, num_pages=4) as engine:
        engine.submit([5], gen_length=4).result()
        assert not model.training
    assert model.training


def test_pages_by_default() -> None:
    """Enough for the longest requests, as many as may run."""
    with fd.Engine(tiny_llada(1), max_rows=3) as engine:
        assert engine.stats.num_pages == 3 * 256 // 32
        assert engine.longest == 256


def test_kept_prompts_are_exact_where_nothing_else_differs() -> None:
    """The same prompt and length: its keys are those that would be computed."""
    for family in (tiny_llada, tiny_dream):
        model, prompt = family(3), random_prompt(random.Random(1), 64, 64)
        settings: dict[str, Any] = {
            "gen_length": 24,
            "block_length": 8,
            "temperature": 1.0,
            "stop_on_eos": False,
        }
        engine = Stepped(model, num_pages=40, reuse_prompts=True)
        for seed in range(3):
            request = engine.submit(prompt, seed=seed, **settings)
            engine.run()
            assert_same(request.result(0), alone(model, prompt, settings | {"seed": seed}))
        assert engine.stats.reused_tokens == 2 * 32, "never the last token, and whole pages"
        assert engine.stats.free_pages == 40 - 2, "the prompt's pages are kept"


@pytest.mark.parametrize("family", [tiny_llada, tiny_dream])
def test_kept_prompts_of_other_rows(family: Any) -> None:
    """A common beginning is not computed again, and its keys are the earlier row's; pages go when needed."""
    model, rng = family(3), random.Random(2)
    begin = random_prompt(rng, 70, 70)
    prompts = [torch.cat((begin, random_prompt(rng, n, n))) for n in (10, 20, 30)]
    settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, "stop_on_eos": False}
    engine = Stepped(model, num_pages=8, reuse_prompts=True)
    queries: list[int] = []
    turn = engine._scheduler._take_turn

    def watched(decoder: Any, rows: Any) -> None:
        queries.extend(
            b - a for row in rows if row.nfe == 0 for a, b in [row.next_step(decoder.family.shift).queries]
        )
        turn(decoder, rows)

    engine._scheduler._take_turn = watched  # type: ignore[method-assign]
    found = []
    for prompt in prompts:
        request = engine.submit(prompt, **settings)
        engine.run()
        found.append(request.result(0))
    assert queries == [104, 114 - 64, 124 - 64]
    assert engine.stats.reused_tokens == 128
    assert_same(found[0], alone(model, prompts[0], settings))
    assert all(len(completion.tokens) == 24 for completion in found)
    other = random_prompt(rng, 200, 200)
    large = engine.submit(other, **settings)
    engine.run()
    assert_same(large.result(0), alone(model, other, settings))
    assert engine.stats.put_aside == 0


def test_a_closed_engine_gives_its_memory_back_at_once() -> None:
    """Without the collector's help: pages may be most of a machine's memory."""
    model = tiny_llada(1)
    with without_collector():
        engine = fd.Engine(model, num_pages=4)
        requests = [engine.submit([5], gen_length=4) for _ in range(3)]
        requests.append(engine.submit([5], gen_length=100, every_commit=True, steps=100, cache="none"))
        requests[0].result()
        requests[1].cancel()
        engine.close()
        pages = weakref.ref(engine.cache.storage[0])
        del engine, requests
        assert pages() is None
