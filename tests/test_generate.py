from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.demo_tasks import held_out
from fastdllm_ext.forward import Attention
from fastdllm_ext.patching.registry import patched_family
from slow_reference import slow_generate
from tiny import EOS, MASK, PAD, VOCAB, random_prompt, random_rule, random_shape, tiny_dream, tiny_llada

CACHES = ("none", "prefix", "dual")


def assert_row(
    output: fd.GenerationOutput, b: int, prompt: torch.Tensor, truth: Any, error: float = 1e-5
) -> None:
    first, total = int(output.prompt_lengths[b]), int(output.prompt_lengths[b]) + len(truth.tokens)
    assert output.sequences[b, :first].tolist() == prompt[:first].tolist()
    assert output.sequences[b, first:total].tolist() == truth.tokens
    assert int(output.lengths[b]) == first + truth.length
    assert int(output.nfe[b]) == truth.nfe
    assert output.step_map[b, : total - first].tolist() == truth.step_map
    torch.testing.assert_close(
        output.confidence[b, : total - first], torch.tensor(truth.confidence), rtol=10 * error, atol=error
    )


def random_tiny(rng: random.Random, seed: int, family: str) -> Any:
    return {"llada": tiny_llada, "dream": tiny_dream}[family](seed, **random_shape(rng, family))


def random_settings(rng: random.Random, seed: int, gen_length: int, shifts: bool) -> dict[str, Any]:
    """Every cache mode under every rule, and now and then one of the other settings."""
    settings: dict[str, Any] = {
        "block_length": rng.choice([1, 3, 8, 16, 32, 80]),
        "cache": CACHES[seed % 3],
        **random_rule(rng, gen_length),
    }
    kind = rng.randrange(8)
    if "steps" in settings:
        settings["schedule"] = rng.choice(["even", "even", "linear"])
        settings["eps"] = rng.choice([1e-3, 0.05])
    if "factor" not in settings and rng.random() < 0.3:
        settings["remasking"] = rng.choice(["margin", "entropy"])
        if settings["remasking"] == "entropy" and "threshold" in settings:
            settings["threshold"] = -rng.choice([0.1, 1.0, 2.0, 3.0])
    if shifts and rng.random() < 0.3:
        settings |= {"top_p": rng.choice([0.3, 0.8, 0.95]), "top_k": rng.choice([None, 1, 5])}
    if kind == 0:
        settings["cfg_scale"] = rng.choice([0.5, 1.5])
    if kind in (1, 2):
        settings["suffix"] = rng.choice([0, 1, 7, 20])
    if settings["cache"] != "none":
        if kind in (2, 3, 4):
            settings["refresh"] = rng.choice([1, 2, 3, 10])
        if kind in (4, 5):
            settings["window"] = rng.choice([(0, 3), (2, 0), (5, 5), (50, 50)])
    settings["infill"] = kind in (6, 7) and rng.random() < 0.7
    settings["stop_on_eos"] = rng.random() < 0.7
    return settings


def random_rows(rng: random.Random, rows: int, infill: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Prompts and how much to generate; for an infill, rows with masks anywhere but at their beginning."""
    prompts, lengths = [random_prompt(rng) for _ in range(rows)], [rng.randint(1, 70) for _ in range(rows)]
    if not infill:
        return prompts, lengths
    found = []
    for prompt, length in zip(prompts, lengths, strict=True):
        row = torch.cat((prompt, random_prompt(rng, length, length)))
        share = rng.choice([0.05, 0.3, 0.7, 1.0])
        masks = [p for p in range(1, len(row)) if rng.random() < share] or [1]
        row[masks] = MASK
        found.append(row)
    return found, [0] * rows


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("seed", range(520))
def test_token_for_token_as_the_specification(seed: int, family: str) -> None:
    """Random small configurations in float32 against the slow reference, in batches of 1 to 4 rows.

    By both runtimes.

    Where the reference meets two choices that differ by less than what float32 sums in another order may
    change, there is no one right answer, and the next configuration is taken.
    """
    for attempt in range(30):
        rng = random.Random(f"{family} {seed} {attempt}")
        model = random_tiny(rng, seed, family)
        settings = random_settings(rng, seed, 70, family == "dream")
        prompts, lengths = random_rows(rng, rng.choice([1, 1, 2, 4]), settings["infill"])
        truth = [
            slow_generate(model, p, gen_length=n, **settings) for p, n in zip(prompts, lengths, strict=True)
        ]
        if min(row.closest for row in truth) > error_of(settings):
            break
    else:
        raise AssertionError("no configuration with one right answer in 30")
    count = {} if settings["infill"] else {"gen_length": lengths}
    for runtime in ("fused", "modules"):
        output = fd.generate(fd.patch(model, runtime=runtime), prompts, **settings, **count)
        for b, (prompt, row) in enumerate(zip(prompts, truth, strict=True)):
            assert_row(output, b, prompt, row, error_of(settings))
        assert not (output.sequences == MASK).any()


def error_of(settings: dict[str, Any]) -> float:
    """Bound on a confidence's error: logits of size 10 carry some 1e-6 of that, guidance 1 + 2 w times it.

    A margin is the difference of two probabilities, which err against each other: twice as much.
    """
    margin = 2 if settings.get("remasking") == "margin" else 1
    return 1e-5 * margin * (1 + 2 * settings.get("cfg_scale", 0.0))


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("seed", range(48))
def test_a_row_is_the_same_alone_and_in_every_batch(seed: int, family: str) -> None:
    """With everything that is drawn, too: each row has its own seed."""
    rng = random.Random(f"{family} {seed}")
    model = random_tiny(rng, seed, family)
    settings = random_settings(rng, seed, 60, family == "dream")
    settings["temperature"] = rng.choice([0.0, 0.7, 1.5])
    if "steps" in settings and rng.random() < 0.5:
        settings |= rng.choice(
            [{"remasking": "random"}, {"alg_temp": 0.3}, {"remasking": "random", "schedule": "independent"}]
        )
    prompts, lengths = random_rows(rng, 4, settings["infill"])
    seeds = [rng.randrange(2**40) for _ in range(4)]
    order = rng.sample(range(4), 4)
    batches = [[b] for b in range(4)] + [order[:2], order]
    found: dict[int, tuple] = {}
    for batch in batches:
        count = {} if settings["infill"] else {"gen_length": [lengths[b] for b in batch]}
        out = fd.generate(
            model, [prompts[b] for b in batch], seed=[seeds[b] for b in batch], **count, **settings
        )
        for i, b in enumerate(batch):
            end = len(prompts[b]) + lengths[b]
            row = (
                out.sequences[i, :end].tolist(),
                out.step_map[i, : end - int(out.prompt_lengths[i])].tolist(),
                int(out.nfe[i]),
                int(out.lengths[i]),
            )
            assert found.setdefault(b, row) == row


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_temperature_does_to_confidence(family: str, temperature: float) -> None:
    """Nothing in LLaDA, whose confidence is that of the logits; Dream divides the logits by it first."""
    model = {"llada": tiny_llada, "dream": tiny_dream}[family](4)
    prompt = torch.tensor([[5, 6, 7, 8]])
    output = fd.generate(
        model,
        prompt,
        gen_length=12,
        steps=1,
        cache="none",
        temperature=temperature,
        seed=3,
        stop_on_eos=False,
    )
    row = torch.cat((prompt, torch.full((1, 12), MASK)), 1)
    with torch.no_grad():
        logits = model(row).logits[0, 4 - (family == "dream") :][:12]
    p = torch.softmax(logits / (temperature if temperature and family == "dream" else 1.0), 1)
    wanted = p.gather(1, output.sequences[0, 4:, None])[:, 0]
    torch.testing.assert_close(output.confidence[0], wanted, rtol=1e-4, atol=1e-6)  # float32, another order


def test_alg_temp_draws_the_order() -> None:
    """A tiny one is the order of confidence; a large one is another order for another seed."""
    model, prompt = tiny_dream(), torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"gen_length": 24, "steps": 24, "cache": "none", "stop_on_eos": False}
    greedy = fd.generate(model, prompt, **settings).step_map
    assert torch.equal(fd.generate(model, prompt, alg_temp=1e-6, seed=1, **settings).step_map, greedy)
    drawn = [fd.generate(model, prompt, alg_temp=5.0, seed=seed, **settings).step_map for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    torch.manual_seed(9)
    unseeded = [fd.generate(model, prompt, alg_temp=5.0, **settings).step_map for _ in range(2)]
    assert not torch.equal(*unseeded), "without a seed every call draws anew"
    assert not torch.equal(drawn[0], greedy)
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_dream_rounds_cosines_and_sines_as_its_modules_do(family: str, pages: torch.dtype) -> None:
    model = {"llada": tiny_llada, "dream": tiny_dream}[family](dtype=torch.bfloat16)
    geometry = patched_family(model).geometry(model)
    cache = fd.PagedKVCache(*(2, geometry.num_kv_heads, 8), num_pages=1, dtype=pages)
    tables = Attention(geometry, cache, 40, torch.bfloat16).tables[torch.device("cpu")]
    rounded = [torch.equal(table, table.bfloat16().float()) for table in tables]
    assert rounded == [family == "dream"] * 2


def test_same_seed_same_sample_other_seed_another() -> None:
    model, prompt = tiny_llada(), torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"gen_length": 40, "temperature": 1.0, "threshold": 0.2}
    first = fd.generate(model, prompt, seed=1, **settings).sequences
    assert torch.equal(first, fd.generate(model, prompt, seed=1, **settings).sequences)
    assert not torch.equal(first, fd.generate(model, prompt, seed=2, **settings).sequences)
    torch.manual_seed(9)
    drawn = fd.generate(model, prompt, **settings).sequences
    torch.manual_seed(9)
    assert torch.equal(drawn, fd.generate(model, prompt, **settings).sequences)
    twins = fd.generate(model, prompt.repeat(2, 1), seed=1, **settings).sequences
    assert torch.equal(twins[0], first[0])
    assert not torch.equal(twins[0], twins[1]), "rows of one seed sample from their own streams"


def test_padding_is_left_out() -> None:
    model = tiny_llada()
    rows = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([11, 12])]
    wanted = fd.generate(model, rows, gen_length=20)
    left = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, PAD, 11, 12]])
    right = torch.tensor([[5, 6, 7, 8, 9], [11, 12, PAD, PAD, PAD]])
    for ids, mask in ((left, left != PAD), (right, (right != PAD).long())):
        output = fd.generate(model, ids, attention_mask=mask, gen_length=20)
        assert torch.equal(output.sequences, wanted.sequences)
        assert output.prompt_lengths.tolist() == [5, 2]


def test_an_empty_prompt_is_a_prompt() -> None:
    model, empty = tiny_llada(), torch.zeros(0, dtype=torch.int64)
    settings: dict[str, Any] = {"gen_length": 20, "block_length": 8, "threshold": 0.2, "cache": "dual"}
    assert_row(fd.generate(model, [empty], **settings), 0, empty, slow_generate(model, empty, **settings))


@pytest.mark.parametrize("cache", CACHES)
def test_bfloat16(cache: str) -> None:
    """Runs to the end as in float32. (How far answers agree is measured on the demo model.)"""
    rng = random.Random(5)
    prompts = [random_prompt(rng, 10, 40) for _ in range(4)]
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "steps": 16, "cache": cache}
    output = fd.generate(tiny_llada(1, dtype=torch.bfloat16), prompts, stop_on_eos=False, **settings)
    assert not (output.sequences == MASK).any()
    assert output.nfe.tolist() == [16] * 4
    assert all(torch.bincount(steps).tolist() == [2] * 16 for steps in output.step_map)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", [{"threshold": 0.9}, {"factor": 1.0}, {"steps": 32}])
def test_bfloat16_rows_agree_alone_and_together(cache: str, rule: dict[str, Any]) -> None:
    """On the demo model, where all of 54 rows did, under each of these, alone and in batches of 9.

    It is no promise: a library's matrix product may sum in another order for another number of rows.
    """
    model, tokenizer = fd.load(fd.demo_model_path(), dtype=torch.bfloat16, device="cpu")
    prompts = [torch.tensor(tokenizer(p.prompt)["input_ids"]) for p in held_out(3, seed=5)]
    settings: dict[str, Any] = {"gen_length": 96, "cache": cache, **rule}
    together = fd.generate(model, prompts, **settings)
    alone = [fd.generate(model, [prompt], **settings) for prompt in prompts]
    equal = sum(a.answers()[0].tolist() == b.tolist() for a, b in zip(alone, together.answers(), strict=True))
    assert equal >= len(prompts) - 1


def test_the_rest_behind_eos_is_padding_and_costs_nothing() -> None:
    """A row that stops has the tokens that decoding on would give, and takes fewer forwards."""
    stopped = 0
    for seed in range(12):
        model = tiny_llada(seed)
        with torch.no_grad():
            model.model.transformer["ff_out"].weight[EOS] *= 2.5  # an EOS turns up early
        settings: dict[str, Any] = {"gen_length": 60, "block_length": 10, "steps": 30}
        prompt = torch.randint(2, MASK, (1, 9))
        short, full = (fd.generate(model, prompt, stop_on_eos=stop, **settings) for stop in (True, False))
        end = int(short.lengths[0])
        assert end == int(full.lengths[0])
        assert torch.equal(short.sequences[0, :end], full.sequences[0, :end])
        assert (short.sequences[0, end:] == PAD).all()
        assert (short.step_map[0, end - 9 :] == -1).all()
        assert short.nfe <= full.nfe
        stopped += int(short.nfe < full.nfe)
    assert stopped >= 6


def test_output_describes_the_run() -> None:
    model = tiny_llada()
    output = fd.generate(model, [torch.tensor([5, 6]), torch.tensor([7])], gen_length=[30, 12], steps=10)
    assert output.step_map.shape == (2, 30)
    assert (output.step_map[1, 12:] == -1).all()
    assert output.sequences.shape == (2, 32)
    assert [len(a) for a in output.answers()] == (output.lengths - output.prompt_lengths).tolist()
    assert torch.equal(output.tokens_per_forward, (output.lengths - output.prompt_lengths) / output.nfe)
    t = output.timings
    assert 0 < t.refresh + t.block_steps + t.selection <= t.total
    assert output.tokens_per_second > 0


def test_model_generate_and_config_objects() -> None:
    model, prompt = tiny_llada(), torch.tensor([[4, 5, 6]])
    config = fd.GenerationConfig(gen_length=24, block_length=8, threshold=0.3)
    a = fd.generate(model, prompt, config=config)
    assert torch.equal(
        a.sequences, model.generate(prompt, gen_length=24, block_length=8, threshold=0.3).sequences
    )
    b = fd.generate(model, prompt, config=config, steps=6)  # an argument's rule replaces the config's
    assert torch.equal(
        b.sequences, fd.generate(model, prompt, gen_length=24, block_length=8, steps=6).sequences
    )
    timed = fd.GenerationConfig(gen_length=24, steps=20, schedule="linear")
    c = fd.generate(model, prompt, config=timed, steps=6)
    assert torch.equal(
        c.sequences, fd.generate(model, prompt, gen_length=24, steps=6, schedule="linear").sequences
    )
    assert torch.equal(
        fd.generate(model, prompt, config=timed, threshold=0.3).sequences,
        fd.generate(model, prompt, max_new_tokens=24, threshold=0.3).sequences,
    )
    default = fd.generate(model, prompt)
    assert torch.equal(default.sequences, fd.generate(model, prompt, threshold=0.9, gen_length=128).sequences)


def test_own_cache_is_used_and_given_back() -> None:
    model = tiny_llada()
    cache = fd.PagedKVCache(2, 4, 8, num_pages=5, page_size=16)
    output = fd.generate(model, torch.tensor([[4, 5, 6]]), gen_length=60, kv_cache=cache)
    assert torch.equal(
        output.sequences, fd.generate(model, torch.tensor([[4, 5, 6]]), gen_length=60).sequences
    )
    assert (cache.stats.num_free, cache.stats.peak_used) == (5, 4)


class Recorder:
    def __init__(self) -> None:
        self.commits: list[fd.Commit] = []
        self.ended = 0

    def on_commit(self, commit: fd.Commit) -> None:
        self.commits.append(commit)

    def end(self) -> None:
        self.ended += 1


def test_denoising_streamer_sees_every_commit() -> None:
    recorder = Recorder()
    prompts = [torch.tensor([5, 6]), torch.tensor([7])]
    output = fd.generate(tiny_llada(), prompts, gen_length=30, steps=10, streamer=recorder, stop_on_eos=False)
    assert recorder.ended == 1
    tokens = torch.full((2, 30), -1)
    steps = torch.full((2, 30), -1, dtype=torch.int32)
    for commit in recorder.commits:
        assert commit.positions == sorted(commit.positions)
        assert commit.positions
        tokens[commit.row, commit.positions] = torch.tensor(commit.tokens)
        steps[commit.row, commit.positions] = commit.step
        assert output.confidence[commit.row, commit.positions].tolist() == commit.confidence
    assert torch.equal(steps, output.step_map)
    for b, answer in enumerate(output.sequences):
        first = len(prompts[b])
        assert torch.equal(tokens[b], answer[first : first + 30])


class TextRecorder:
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.dim() == 1
        self.parts.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_text_streamer_gets_the_prompt_then_blocks() -> None:
    recorder = TextRecorder()
    output = fd.generate(
        tiny_llada(), torch.tensor([[5, 6]]), gen_length=30, block_length=10, streamer=recorder
    )
    assert recorder.parts[0] == [5, 6]
    assert list(itertools.chain(*recorder.parts)) == output.sequences[0, : int(output.lengths[0])].tolist()
    assert recorder.ended == 1
    assert 2 <= len(recorder.parts) <= 4


# --- Bad input -------------------------------------------------------------------------------------

ROW = torch.tensor([[4, 5, 6]])


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"gen_length=0; takes 1 or more", {"gen_length": 0}),
        (ValueError, r"gen_length=-3", {"gen_length": [4, -3]}),
        (TypeError, r"gen_length=2.5; takes an int", {"gen_length": 2.5}),
        (ValueError, r"gen_length holds 2 numbers for 1 rows", {"gen_length": [4, 4]}),
        (ValueError, r"block_length=0; takes 1 or more", {"block_length": 0}),
        (TypeError, r"block_length=True", {"block_length": True}),
        (ValueError, r"steps=0; takes 1 or more", {"steps": 0}),
        (ValueError, r"threshold=0; takes a number above 0 and at most 1", {"threshold": 0}),
        (ValueError, r"threshold=1.5", {"threshold": 1.5}),
        (ValueError, r"threshold=nan", {"threshold": float("nan")}),
        (TypeError, r"threshold='0.9'", {"threshold": "0.9"}),
        (ValueError, r"factor=0; takes a number above 0", {"factor": 0}),
        (ValueError, r"factor=-1.0", {"factor": -1.0}),
        (ValueError, r"factor=inf", {"factor": float("inf")}),
        (ValueError, r"temperature=-0.1; takes a number from 1e-6, or 0", {"temperature": -0.1}),
        (ValueError, r"steps=4, threshold=0.9: takes only one", {"steps": 4, "threshold": 0.9}),
        (ValueError, r"threshold=0.9, factor=1.0: takes only one", {"factor": 1.0, "threshold": 0.9}),
        (ValueError, r"cache='both'; takes one of none, prefix, dual", {"cache": "both"}),
        (ValueError, r"remasking='low'; takes one of low_confidence, random, margin, entropy",
         {"remasking": "low"}),
        (TypeError, r"stop_on_eos=1", {"stop_on_eos": 1}),
        (ValueError, r"seed=-1; takes 0 to", {"seed": -1}),
        (TypeError, r"seed=1.5", {"seed": 1.5}),
        (ValueError, r"seed holds 3 numbers for 1 rows", {"seed": [1, 2, 3]}),
        (ValueError, r"top_p=0.9, top_k=None: llada takes neither", {"top_p": 0.9}),
        (ValueError, r"max_new_tokens=5, gen_length=4: are two names",
         {"max_new_tokens": 5, "gen_length": 4}),
        (ValueError, r"schedule='cosine'; takes one of even, linear, independent", {"schedule": "cosine"}),
        (ValueError, r"schedule='linear': is a matter of steps; takes steps=", {"schedule": "linear"}),
        (ValueError, r"alg_temp=0.5: is a matter of steps", {"alg_temp": 0.5, "threshold": 0.9}),
        (ValueError, r"schedule='independent' takes remasking='random' and alg_temp=0, got 'low_confidence'",
         {"schedule": "independent", "steps": 4}),
        (ValueError, r"eps=1; takes a number above 0 and below 1", {"eps": 1}),
        (ValueError, r"threshold=0.5; takes a number of at most 0",
         {"remasking": "entropy", "threshold": 0.5}),
        (ValueError, r"remasking='entropy': takes a threshold \(of at most 0\) or steps",
         {"remasking": "entropy"}),
        (ValueError, r"remasking='margin': factor bounds probabilities",
         {"remasking": "margin", "factor": 1.0}),
        (ValueError, r"alg_temp=-1; takes a number from 1e-6", {"alg_temp": -1, "steps": 4}),
        (ValueError, r"cfg_scale=-0.5; takes a number of 0 or more", {"cfg_scale": -0.5}),
        (ValueError, r"refresh='always'; takes 'block', or a number of blocks", {"refresh": "always"}),
        (ValueError, r"refresh=0; takes 1 or more", {"refresh": 0}),
        (TypeError, r"window=3; takes two ints, \(before, after\)", {"window": 3}),
        (ValueError, r"window=-1; takes 0 or more", {"window": (0, -1)}),
        (ValueError, r"suffix=-1; takes 0 or more", {"suffix": -1}),
        (ValueError, r"suffix=3: an infill attends to everything", {"suffix": 3, "infill": True}),
        (ValueError, r"cache='none' computes the whole row at every step: refresh=2",
         {"cache": "none", "refresh": 2}),
        (ValueError, r"refresh='block' and window=\(1, 0\) take cache='prefix' or 'dual'",
         {"cache": "none", "window": (1, 0)}),
        (TypeError, r"infill=1; takes True or False", {"infill": 1}),
        (ValueError, rf"input_ids\[0\] holds no mask token {MASK}; infill takes one or more",
         {"infill": True}),
        (ValueError, r"input_ids\[0\] of 257 tokens exceeds the model's 256 positions",
         {"infill": True, "input_ids": torch.full((1, 257), MASK)}),
        (ValueError, r"top_k=0; takes 1 or more", {"top_k": 0}),
        (ValueError, r"eos_token_id=-1; takes 0 or more", {"eos_token_id": [4, -1]}),
        (TypeError, r"mask_token_id='x'; takes an int", {"mask_token_id": "x"}),
        (TypeError, r"return_dict_in_generate=1; takes True or False", {"return_dict_in_generate": 1}),
        (TypeError, r"unknown argument 'treshold'; takes alg_temp, block_length, cache", {"treshold": 0.9}),
        (TypeError, r"config=dict; takes a fastdllm_ext.GenerationConfig", {"config": {}}),
        (ValueError, r"gen_length=254: .* exceeds the model's 256 positions", {"gen_length": 254}),
        (ValueError, r"attention_mask has shape \[1, 2\]; takes input_ids' shape \[1, 3\]",
         {"attention_mask": torch.ones(1, 2)}),
        (ValueError, r"attention_mask\[0\] has zeros inside", {"attention_mask": torch.tensor([[1, 0, 1]])}),
        (ValueError, r"attention_mask\[0\] holds other values", {"attention_mask": 2 * torch.ones(1, 3)}),
        (TypeError, r"attention_mask=list", {"attention_mask": [[1, 1, 1]]}),
        (TypeError, r"kv_cache=int", {"kv_cache": 3}),
        (ValueError, r"kv_cache holds \(layers, kv heads, head_dim\) \(2, 4, 16\)",
         {"kv_cache": fd.PagedKVCache(2, 4, 16, num_pages=5)}),
        (ValueError, r"kv_cache holds .* in torch.bfloat16 on cpu; takes .* in torch.float32 or torch.float8",
         {"kv_cache": fd.PagedKVCache(2, 4, 8, num_pages=5, dtype=torch.bfloat16)}),
        (ValueError, r"needed 5 pages, 2 of 2 are free", {"kv_cache": fd.PagedKVCache(2, 4, 8, num_pages=2)}),
        (TypeError, r"input_ids=str", {"input_ids": "hello"}),
        (ValueError, r"input_ids holds \['tokens'\]; takes a mapping with 'input_ids'",
         {"input_ids": {"tokens": ROW}}),
        (ValueError, r"input_ids has shape \[3\]; takes \[B, P\]", {"input_ids": ROW[0]}),
        (ValueError, r"input_ids holds no row", {"input_ids": []}),
        (ValueError, r"input_ids\[0\] has shape \[1, 3\]; takes 1-D", {"input_ids": [ROW]}),
        (TypeError, r"input_ids\[0\]=list", {"input_ids": [[1, 2]]}),
        (TypeError, r"input_ids\[0\] has dtype torch.float32; takes torch.int64", {"input_ids": ROW.float()}),
        (ValueError, r"input_ids is on meta; takes the model's device, cpu", {"input_ids": ROW.to("meta")}),
        (ValueError, rf"input_ids\[0\] holds token {VOCAB}; takes 0 to {VOCAB - 1}",
         {"input_ids": ROW + VOCAB - 6}),
        (ValueError, r"input_ids\[0\] holds token -2", {"input_ids": ROW - 6}),
        (ValueError, rf"input_ids\[0\] holds the mask token {MASK}", {"input_ids": ROW + MASK - 6}),
        (ValueError, r"takes input_ids of shape \[B, P\]", {"input_ids": [ROW[0]], "attention_mask": ROW}),
        (ValueError, r"streamer: takes one row, got 2",
         {"input_ids": [ROW[0], ROW[0]], "streamer": TextRecorder()}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """The message names the argument, and the same model goes on as before."""
    model = tiny_llada()
    wanted = fd.generate(model, ROW, gen_length=20).sequences
    arguments = {"input_ids": ROW} | arguments
    pool = getattr(arguments.get("kv_cache"), "pool", None)
    with pytest.raises(error, match=message):
        fd.generate(model, **arguments)
    assert pool is None or pool.num_used == 0
    assert torch.equal(fd.generate(model, ROW, gen_length=20).sequences, wanted)


def test_a_family_may_need_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm_ext.patching.llada import LLaDA

    monkeypatch.setattr(LLaDA, "needs_prompt", True)
    with pytest.raises(ValueError, match=r"input_ids\[1\] is empty; llada takes a prompt"):
        fd.generate(tiny_llada(), [ROW[0], ROW[0, :0]])


def test_dream_needs_a_token_before_the_first_mask() -> None:
    model = tiny_dream()
    with pytest.raises(ValueError, match=r"input_ids\[0\] is empty; dream takes a prompt of 1 token or more"):
        fd.generate(model, [ROW[0, :0]])
    with pytest.raises(ValueError, match=r"input_ids\[0\] begins with a mask; dream takes a token before it"):
        fd.generate(model, [torch.tensor([MASK, 4, MASK])], infill=True)


def test_infill_keeps_what_is_given() -> None:
    model = tiny_llada()
    row = torch.tensor([MASK, 4, MASK, MASK, EOS, 5, MASK, 6])
    output = fd.generate(model, [row], infill=True, block_length=3)
    given = row != MASK
    assert torch.equal(output.sequences[0][given], row[given])
    assert not (output.sequences == MASK).any()
    assert (output.prompt_lengths.item(), output.lengths.item()) == (0, 8)
    assert ((output.step_map[0] < 0) == given).all()
    assert (output.confidence[0] > 0).tolist() == (~given).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_the_model_is_an_error_that_names_the_module(value: float) -> None:
    model = tiny_llada()
    cache = fd.PagedKVCache(2, 4, 8, num_pages=9)
    wanted = fd.generate(model, ROW, gen_length=20).sequences
    weight = model.model.transformer["blocks"][1].up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 4] = value
    with pytest.raises(
        ValueError, match=r"rows \[0, 1\] at step 0; first in the output of .*blocks.1.up_proj"
    ):
        fd.generate(model, [ROW[0], ROW[0]], gen_length=20, kv_cache=cache)
    assert cache.stats.num_used == 0
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(fd.generate(model, ROW, gen_length=20, kv_cache=cache).sequences, wanted)
    assert not any(m._forward_hooks for m in model.modules())


def test_mixed_dtypes_are_refused() -> None:
    model = tiny_llada()
    model.model.transformer["ln_f"].to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"model: parameters of mixed dtypes \['torch.bfloat16', 'torch.float32'\]"
    ):
        fd.generate(model, ROW)


def test_an_error_in_a_streamer_leaves_everything_whole() -> None:
    class Broken(Recorder):
        def on_commit(self, commit: fd.Commit) -> None:
            raise RuntimeError("stop")

    model, cache = tiny_llada(), fd.PagedKVCache(2, 4, 8, num_pages=9)
    wanted = fd.generate(model, ROW, gen_length=20).sequences
    with pytest.raises(RuntimeError, match="stop"):
        fd.generate(model, ROW, gen_length=20, streamer=Broken(), kv_cache=cache)
    assert cache.stats.num_used == 0
    assert torch.equal(fd.generate(model, ROW, gen_length=20, kv_cache=cache).sequences, wanted)
