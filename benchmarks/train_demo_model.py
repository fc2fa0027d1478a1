"""Trains the bundled demo model from nothing: tokenizer, configuration, weights, measurements, model card.

    python benchmarks/train_demo_model.py --out python/fastdllm_ext/demo_model --seed 0

The schedule is counted in steps and every random number comes from the seed, so a run does not depend on
how fast the machine is. It needs a C++ compiler (torch.compile) and no GPU. ``--first-cycle 3`` begins with
the weights in the folder and trains the cycles from the third on; ``--measure-only`` keeps them and renews
the measurements and the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import fastdllm_ext as fd
from fastdllm_ext.demo_tasks import FAMILIES, Problem, held_out, training_stream
from fastdllm_ext.models import LLaDAConfig, LLaDAModelLM

MASK, EOS, UNKNOWN = "<|mask|>", "<|endoftext|>", "<|unknown|>"
GEN_LENGTH, BLOCK_LENGTH = 128, 32
THRESHOLDS = (0.9, 0.99)  # that the model card reports
CONFIDENCES = (0.0, 0.5, 0.8, 0.9, 0.99)  # where the bins of its calibration begin
FULL_LENGTH_SHARE = 0.25  # of the short problems, filled up to the longest row: how they look when decoded


class Phase(NamedTuple):
    """One cycle of training, with fresh optimizers.

    Attributes:
        steps: its length.
        families: what it draws from.
        peak_lr: learning rate after the warm-up.
        decay_from: share of the steps after which a cosine takes the rate to zero.
        difficulty_ramp: steps until problems have their full range of sizes.
        block_share: of rows in the block-wise form, at the start and after `block_ramp` steps.
        tokens: of a step's batch.
        nines: share of additions with many columns that sum to nine and so pass a carry on.
        whole_share: of the block-wise rows, those of which the whole block is masked.
        focus: γ of the focal loss; 0 is cross-entropy.
        sizes: of the blocks, drawn alike.
        row_lengths: a row is filled up with EOS to one of these.
        plain: AdamW alone, in float32 and not compiled, each token weighted alike: Muon and autocast are
            slow on a processor without bfloat16 units.
        warmup: steps until the rate has its peak.
    """

    steps: int
    families: tuple[str, ...]
    peak_lr: float
    decay_from: float
    difficulty_ramp: int
    block_share: tuple[float, float]
    block_ramp: int
    tokens: int = 10752
    nines: float = 0.0
    whole_share: float = 0.0
    focus: float = 0.0
    sizes: tuple[int, ...] = (8, 16, 32, 32)
    row_lengths: tuple[int, ...] = (64, 104, 168)
    plain: bool = False
    warmup: int = 100


_CAUTION = Phase(
    steps=500,
    families=("add", "story", "story", "story", "reverse"),  # a name's shares add up
    peak_lr=2e-4,
    decay_from=0.1,
    difficulty_ramp=1,
    block_share=(1.0, 1.0),
    block_ramp=1,
    tokens=3040,
    nines=0.5,
    whole_share=0.6,
    focus=2.0,
    sizes=(16, 32, 32, 32),
    row_lengths=(64, 104, 152),
    plain=True,
    warmup=30,
)
PHASES = (
    Phase(3300, ("add", "add three", "story", "sort", "reverse"), 2.5e-3, 0.55, 800, (0.3, 0.8), 2500),
    Phase(1000, ("add", "story", "sort", "reverse"), 1.2e-3, 0.2, 1, (0.8, 0.8), 1),
    _CAUTION,
    _CAUTION._replace(steps=330, peak_lr=1.5e-4, decay_from=0.05),
    _CAUTION._replace(steps=300, focus=4.0),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their leading space, single digits and signs; the vocabulary is what the tasks use."""
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    stream = training_stream(seed=0)
    texts = (text for _ in range(20_000) for text in next(stream)[:2])
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = [MASK, EOS, UNKNOWN, *sorted(pieces)]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=MASK,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LLaDAModelLM:
    """The untrained model. Matrices start at 1 / sqrt(fan in), the two that write to the residual smaller."""
    config = LLaDAConfig(
        d_model=192,
        n_layers=6,
        n_heads=3,
        mlp_hidden_size=512,
        vocab_size=len(tokenizer),
        max_sequence_length=512,
        rope_theta=10000.0,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LLaDAModelLM(config)
    for name, weight in model.named_parameters():
        if "blocks" in name and weight.ndim == 2:
            residual = name.endswith(("attn_out.weight", "ff_out.weight"))
            nn.init.normal_(weight, std=(weight.shape[1] * (2 * config.n_layers if residual else 1)) ** -0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.7)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.02)
    return model


def plain_attention(self: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor):
    """LLaDABlock.attention as plain products, whose backward is several times faster on a CPU.

    ``table`` [2, T, head_dim / 2] holds the rotary cosines and sines; the block passes it on as its bias.
    """
    batch, length, width = q.shape
    q, k, v = (x.view(batch, length, -1, self.config.head_dim).transpose(1, 2) for x in (q, k, v))
    cos, sin = table

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    scores = (rotate(q) * self.config.head_dim**-0.5).to(v.dtype) @ rotate(k).to(v.dtype).transpose(-1, -2)
    out = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return self.attn_out(out.transpose(1, 2).reshape(batch, length, width)), None


def rotary(length: int, config: LLaDAConfig) -> torch.Tensor:
    """Cosines and sines [2, length, head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(length), config.rope_theta**-exponent)
    return torch.stack((angles.cos(), angles.sin()))


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, phase: Phase
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of `phase.tokens` tokens: (tokens [B, T], prompt lengths [B], answer lengths [B]).

    T is one of `phase.row_lengths`; problems wait until enough of the same T have come together.
    """
    choose = torch.Generator().manual_seed(seed)
    waiting: dict[int, list[tuple[list[int], list[int]]]] = {length: [] for length in phase.row_lengths}
    stream = training_stream(
        seed, lambda: min(1.0, emitted / phase.difficulty_ramp), phase.families, phase.nines
    )
    emitted = 0
    while True:
        problems = [next(stream) for _ in range(64)]
        prompts = tokenizer([p.prompt for p in problems])["input_ids"]
        answers = tokenizer([p.answer for p in problems])["input_ids"]
        lots = torch.rand(64, generator=choose).tolist()
        for prompt, answer, lot in zip(prompts, answers, lots, strict=True):
            fits = [n for n in phase.row_lengths if len(prompt) + len(answer) < n]
            length = phase.row_lengths[-1] if lot < FULL_LENGTH_SHARE else fits[0]
            waiting[length].append((prompt, answer))
            if len(waiting[length]) == phase.tokens // length:
                rows, waiting[length] = waiting[length], []
                tokens = torch.full((len(rows), length), tokenizer.eos_token_id)
                for row, (p, a) in zip(tokens, rows, strict=True):
                    row[: len(p) + len(a)] = torch.tensor(p + a)
                sizes = torch.tensor([(len(p), len(a)) for p, a in rows])
                yield tokens, sizes[:, 0], sizes[:, 1]
                emitted += 1


def corrupt(
    prompt: torch.Tensor,
    answer: torch.Tensor,
    length: int,
    block_share: float,
    phase: Phase,
    random: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to mask and what to learn: (masked [B, T] bool, weight [B, T] float32).

    Weights sum to 1 a row; in a plain phase to the share of the block that is learned.

    In the LLaDA form, l of a row's response tokens are masked, l uniform, each weighted 1 / l. In the
    block-wise form the same happens inside one random block, all before it is clean and all after it is
    masked but not learned from: a row as block decoding sees it.
    """
    rows = len(prompt)
    block_wise = torch.rand(rows, generator=random) < block_share
    size = torch.tensor(phase.sizes)[torch.randint(len(phase.sizes), (rows,), generator=random)]
    block = (torch.rand(rows, generator=random) * (answer // size + 1)).long()
    start = torch.where(block_wise, prompt + block * size, prompt)[:, None]
    end = torch.where(block_wise[:, None], (start + size[:, None]).clamp(max=length), length)
    position = torch.arange(length)
    inside = (position >= start) & (position < end)
    strata = (torch.randperm(rows, generator=random) + torch.rand(rows, generator=random)) / rows
    count = (strata[:, None] * (end - start)).long() + 1
    if phase.whole_share:
        whole = block_wise & (torch.rand(rows, generator=random) < phase.whole_share)
        count = torch.where(whole[:, None], end - start, count)
    noise = torch.rand(rows, length, generator=random).masked_fill(~inside, 2.0)
    learn = inside & (noise.argsort(dim=1).argsort(dim=1) < count)
    weight = learn / (size[:, None] if phase.plain else learn.sum(dim=1, keepdim=True))
    return learn | (position >= end), weight


def learning_rate(step: int, phase: Phase) -> float:
    """Warm-up, a plateau, then a cosine to zero."""
    decay = max(0.0, step / phase.steps - phase.decay_from) / (1 - phase.decay_from)
    return phase.peak_lr * min(1.0, (step + 1) / phase.warmup) * 0.5 * (1 + math.cos(math.pi * decay))


def train(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int, out: Path
) -> None:
    """One cycle: Muon on the blocks' matrices, unless the phase is plain, and AdamW on everything else."""
    for block in model.model.transformer["blocks"]:
        block.attention = plain_attention.__get__(block)
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not ("blocks" in n and p.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = []
    if phase.plain:
        others += matrices
    else:
        optimizers.append(
            torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        )
    optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.1, fused=True))
    tables = {length: rotary(length, model.config) for length in phase.row_lengths}
    network = model.model if phase.plain else torch.compile(model.model, dynamic=False)
    random = torch.Generator().manual_seed(seed)
    began, running = time.time(), 0.0
    stream = zip(range(phase.steps), batches(tokenizer, seed, phase), strict=False)
    for step, (tokens, prompt, answer) in stream:
        first, last = phase.block_share
        block_share = first + min(1.0, step / phase.block_ramp) * (last - first)
        masked, weight = corrupt(prompt, answer, tokens.shape[1], block_share, phase, random)
        with torch.autocast("cpu", torch.bfloat16, enabled=not phase.plain):
            visible = tokens.masked_fill(masked, tokenizer.mask_token_id)
            logits, _ = network(visible, attention_bias=tables[tokens.shape[1]])
        picked = weight > 0
        losses = F.cross_entropy(logits[picked].float(), tokens[picked], reduction="none")
        if phase.focus:
            losses = losses * (1 - torch.exp(-losses)) ** phase.focus
        loss = (losses * weight[picked]).sum() / len(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, phase)
            optimizer.step()
            optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.time() - began
            print(f"step {step + 1}/{phase.steps} loss {running / 50:.4f} {seconds:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 500 == 0:
            save(model, out)
    save(model, out)


def processor() -> str:
    """The processor's architecture, and the vector instructions that torch uses on it."""
    return f"an {platform.machine()} processor with {torch.backends.cpu.get_cpu_capability()}"


def save(model: LLaDAModelLM, out: Path) -> None:
    """Weights rounded to bfloat16, which halves the file; the configuration has them load as float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    model.config.save_pretrained(out)
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    (out / "model.safetensors").write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """As save_pretrained does, under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def measure(
    model: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    cache: str,
    **rule: float,
) -> dict[str, Any]:
    """Exact match (the whole answer, scratchpad included), forwards, and tokens to EOS a forward."""
    prompts = [torch.tensor(tokenizer(p.prompt)["input_ids"]) for p in problems]
    right: Counter[str] = Counter()
    tokens, nfe, batch = 0, 0, 100
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        done = fd.generate(model, part, gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, cache=cache, **rule)
        nfe += int(done.nfe.sum())
        rows = zip(problems[first:], part, done.sequences.tolist(), done.lengths.tolist(), strict=False)
        for problem, prompt, row, length in rows:
            tokens += length - len(prompt)
            answer = tokenizer.decode(row[len(prompt) : length], skip_special_tokens=True)
            right[problem.family] += answer == problem.answer
    share = right.total() / len(problems)
    sizes = Counter(p.family for p in problems)
    result: dict[str, Any] = {
        "rule": ", ".join(f"{name} {value:g}" for name, value in rule.items()),
        "cache": cache,
        "accuracy": round(share, 4),
        "standard_error": round(math.sqrt(share * (1 - share) / len(problems)), 4),
        "by_family": {family: round(right[family] / sizes[family], 4) for family in FAMILIES},
        "nfe": round(nfe / len(problems), 2),
        "tokens_per_forward": round(tokens / nfe, 2),
    }
    print(result, flush=True)
    return result


def reference(out: Path, count: int) -> list[dict[str, Any]]:
    """One token a step with no cache."""
    return [measure(*fd.load(out, device="cpu"), held_out(count, seed=1), "none", steps=GEN_LENGTH)]


def rules(out: Path, count: int, cache: str) -> list[dict[str, Any]]:
    """The card's rules with a cache, and the smallest step count that spends what the threshold spends."""
    model, tokenizer = fd.load(out, device="cpu")
    problems = held_out(count, seed=1)
    results = []
    for threshold in THRESHOLDS:
        results.append(measure(model, tokenizer, problems, cache, threshold=threshold))
        budget = results[-1]["nfe"]
        few = problems[: max(len(FAMILIES), count // 10)]  # these find where the search begins
        steps = math.ceil(budget)
        while measure(model, tokenizer, few, cache, steps=steps)["nfe"] < 0.97 * budget:
            steps += 1
        while (fixed := measure(model, tokenizer, problems, cache, steps=steps))["nfe"] < budget:
            steps += 1
        results.append(fixed)
    results.append(measure(model, tokenizer, problems, cache, factor=1.0))
    return results


def calibration(out: Path, count: int) -> list[dict[str, Any]]:
    """How often a confidence is right: of each whole block of masks, with the right answer on its left."""
    model, tokenizer = fd.load(out, device="cpu")
    total, right = Counter[float](), Counter[float]()
    for problem in held_out(count, seed=1):
        prompt, answer = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.answer))
        response = answer + [tokenizer.eos_token_id] * (GEN_LENGTH - len(answer))
        rows = torch.tensor([prompt + response] * (len(answer) // BLOCK_LENGTH + 1))
        visible = rows.clone()
        for block, row in enumerate(visible):
            row[len(prompt) + block * BLOCK_LENGTH :] = tokenizer.mask_token_id
        with torch.no_grad():
            probabilities = model(input_ids=visible).logits.softmax(dim=-1)
        for block, row in enumerate(probabilities):
            here = slice(len(prompt) + block * BLOCK_LENGTH, len(prompt) + (block + 1) * BLOCK_LENGTH)
            for confidence, same in zip(
                *(row[here].max(dim=-1)[0], row[here].argmax(dim=-1) == rows[block, here]), strict=True
            ):
                low = max(x for x in CONFIDENCES if x <= confidence)
                total[low] += 1
                right[low] += bool(same)
    return [
        {"from": x, "tokens": total[x], "right": round(right[x] / max(1, total[x]), 5)} for x in CONFIDENCES
    ]


def measurements(out: Path, count: int, jobs: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the rules of the model card, its calibration), in ``jobs`` processes of one thread each."""
    tasks: list[Callable[[], list[dict[str, Any]]]] = [partial(reference, out, count)]
    tasks += [partial(rules, out, count, cache) for cache in ("none", "prefix", "dual")]
    tasks.append(partial(calibration, out, count))
    single = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=single) as pool:
        *results, calibrated = [done.result() for done in [pool.submit(task) for task in tasks]]
    return [row for rows in results for row in rows], calibrated


CARD = """# Demo model

A masked diffusion model of {millions:.1f} M parameters in the LLaDA architecture ({layers} layers, width
{width}, {heads} heads, vocabulary {vocabulary}), small enough to bundle. It adds numbers column by column and
reverses lists of words; it knows little else. It exists so that block-wise parallel decoding can be tried,
tested and measured without a download, on a task in which tokens depend on one another: the lines of an
addition pass on a carry.

| family | prompt | answer (lines side by side) |
| --- | --- | --- |
{examples}

Trained sizes: sums of two numbers of which the longer has 4 to 10 digits (in a story 3 to 7), lists of 6 to
16 of the vocabulary's words. Other sizes and other wordings are outside what it can do. It also practised
adding three numbers and sorting, which it does not master: these are neither measured nor claimed.
Generation length {gen_length}, block length {block_length}.

## Training

`{command}`, in {cycles} cycles:

| steps | minutes | on | torch |
| --- | --- | --- | --- |
{cycle_rows}

The machines did other work at the same time; hence the minutes. The training text is made up on the fly by
`fastdllm_ext/demo_tasks.py`; nothing else went in. A prompt whose checksum marks it as held out is never
trained on; everything measured below is held out. Loss: masked-token cross-entropy weighted one over the
number of masked tokens, over the whole response for a part of the rows and inside one block (clean on
its left, masked on its right) for the others. Muon on the blocks' matrices, AdamW on the rest, in two
cycles of which the second has fewer families. The later cycles are about what a decoder with a threshold
sees first: {whole:.0%} of their rows show a block in which all is masked, {nines:.0%} of their additions
have many columns that sum to nine and so pass a carry on (those measured are drawn evenly), and the loss is
a focal one (γ = {focuses}), which is about the tokens that are hard. AdamW, float32.
Weights are stored as bfloat16 and meant to be run in float32.

**What a confidence means.** A focal loss makes a model understate how sure it is, on purpose: the same
threshold lets fewer errors pass and costs more forwards. Of whole blocks of masks, with the right answer on
their left, this share of the likeliest tokens is right:

| confidence | tokens | right |
| --- | --- | --- |
{calibration_rows}

So this model's 0.9 does not compare with the 0.9 of a model trained with cross-entropy; compare at equal NFE.

## Measured

Exact match of the whole answer on {count} held-out prompts, the families in equal parts, ± one standard
error; NFE is the mean number of forwards a prompt; tokens count up to and including the end-of-text token.
The fixed step count is the smallest that spends at least the NFE of the threshold above it (a prompt whose
answer ends early takes only a part of its steps). The same numbers are in `metrics.json`.

| rule | cache | accuracy | {families} | NFE | tokens / forward |
| --- | --- | --- | {rule_line} | --- | --- |
{results}
"""


def card(out: Path, metrics: dict[str, Any]) -> str:
    """The model card's text."""
    config = LLaDAConfig.from_pretrained(out)
    examples = [
        (p.family, f"`{p.prompt}`", f"`{p.answer}`".replace("\n", "` `"))
        for p in held_out(len(FAMILIES), seed=2)
    ]
    results = [
        (
            r["rule"],
            r["cache"],
            f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f}",
            *(f"{100 * r['by_family'][family]:.1f}" for family in FAMILIES),
            f"{r['nfe']:.1f}",
            f"{r['tokens_per_forward']:.1f}",
        )
        for r in metrics["results"]
    ]
    return CARD.format(
        millions=metrics["training"]["parameters"] / 1e6,
        layers=config.n_layers,
        width=config.d_model,
        heads=config.n_heads,
        vocabulary=config.vocab_size,
        gen_length=GEN_LENGTH,
        block_length=BLOCK_LENGTH,
        count=metrics["prompts"],
        examples="\n".join(f"| {' | '.join(row)} |" for row in examples),
        families=" | ".join(FAMILIES),
        rule_line=" | ".join("---" for _ in FAMILIES),
        results="\n".join(f"| {' | '.join(row)} |" for row in results),
        command=metrics["training"]["command"],
        cycles=len(PHASES),
        cycle_rows="\n".join(
            f"| {c['steps']} | {c['minutes']} | {c['machine']} | {c['torch']} |"
            for c in metrics["training"]["cycles"]
        ),
        whole=PHASES[-1].whole_share,
        nines=PHASES[-1].nines,
        focuses=", then ".join(f"{g:g}" for g in dict.fromkeys(p.focus for p in PHASES if p.focus)),
        calibration_rows="\n".join(
            f"| {c['from']:g} to {end:g} | {c['tokens']} | {100 * c['right']:.2f}% |"
            for c, end in zip(metrics["calibration"], (*CONFIDENCES[1:], 1), strict=True)
        ),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=1002, help="held-out prompts to measure on")
    parser.add_argument("--jobs", type=int, default=2, help="processes that measure, of one thread each")
    parser.add_argument("--first-cycle", type=int, default=1, help="begin here, with the folder's weights")
    parser.add_argument("--measure-only", action="store_true", help="keep the weights")
    args = parser.parse_args()
    record = args.out / "metrics.json"
    if args.measure_only or args.first_cycle > 1:
        training = json.loads(record.read_text())["training"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        save_tokenizer(tokenizer, args.out)
        model = build_model(tokenizer)
        training = {
            "command": f"python benchmarks/train_demo_model.py --out DIR --seed {args.seed}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "cycles": [],
        }
        save(model, args.out)
    if not args.measure_only:
        for number, phase in list(enumerate(PHASES))[args.first_cycle - 1 :]:
            model = model if number == 0 else LLaDAModelLM.from_pretrained(args.out, dtype=torch.float32)
            began = time.time()
            train(model, tokenizer, phase, args.seed + number, args.out)
            training["cycles"].append(
                {
                    "steps": str(phase.steps),
                    "minutes": round((time.time() - began) / 60, 1),
                    "machine": f"{torch.get_num_threads()} threads of {processor()}",
                    "torch": torch.__version__,
                }
            )
    results, calibrated = measurements(args.out, args.prompts, args.jobs)
    metrics = {
        "training": training,
        "prompts": args.prompts,
        "calibration": calibrated,
        "results": results,
    }
    record.write_text(json.dumps(metrics, indent=1) + "\n")
    (args.out / "README.md").write_text(card(args.out, metrics))


if __name__ == "__main__":
    main()
