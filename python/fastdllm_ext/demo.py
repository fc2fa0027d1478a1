"""The main job on the bundled model: the unpatched loop first, then patched, over held-out prompts.

The baseline is the uncached loop as it is published for LLaDA: a full forward of the whole row for
every token, softmax in float64 over every position, no stop at the end of the sequence.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdllm_ext.decoding import GenerationOutput
from fastdllm_ext.demo_tasks import Problem, held_out
from fastdllm_ext.env import collect_env
from fastdllm_ext.generate import generate
from fastdllm_ext.load import demo_model_path, load
from fastdllm_ext.methods import patch
from fastdllm_ext.patching.registry import unpatch
from fastdllm_ext.view import DenoisingView

GEN_LENGTH, BLOCK_LENGTH = 128, 32
RULES: dict[str, dict[str, Any]] = {
    "quota, 4 a step": {"steps": GEN_LENGTH // 4},
    "quota, 8 a step": {"steps": GEN_LENGTH // 8},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.99": {"threshold": 0.99},
    "factor 1": {"factor": 1.0},
}
CACHES = ("none", "prefix", "dual")


@torch.no_grad()
def baseline(model: Any, prompt: Tensor, gen_length: int, block_length: int) -> tuple[Tensor, int]:
    """The published uncached loop, one token a step. prompt [P] -> (row [P + G], forwards)."""
    mask_id, start = model.config.mask_token_id, len(prompt)
    row = torch.cat((prompt, torch.full((gen_length,), mask_id)))[None]
    for block in range(start, start + gen_length, block_length):
        end = min(block + block_length, start + gen_length)
        for _ in range(end - block):
            logits = model(row).logits
            confidence, candidate = _confidence(logits, mask_id)
            open_positions = torch.eq(row, mask_id)
            open_positions[:, end:] = False
            best = torch.where(open_positions, confidence, -math.inf).argmax()
            row[0, best] = candidate[0, best]
    return row[0], gen_length


def _confidence(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    probability = logits.double().softmax(-1)
    logits[..., mask_id] = -math.inf
    candidate = logits.argmax(-1)
    return probability.gather(-1, candidate[..., None])[..., 0], candidate


@dataclass
class Method:
    """One way to decode, and what it has done so far."""

    name: str
    cache: str
    rule: str
    run: Callable[[Any, Tensor], tuple[Tensor, int]]
    patched: bool = True
    correct: int = 0
    tokens: int = 0
    nfe: int = 0
    seconds: list[float] = field(default_factory=list)

    def answer(self, model: Any, tokenizer: Any, problem: Problem) -> None:
        """Decodes one prompt and takes down the time, the forwards, and whether the answer is right."""
        prompt = torch.tensor(tokenizer(problem.prompt)["input_ids"])
        (patch if self.patched else unpatch)(model)
        begin = time.perf_counter()
        row, nfe = self.run(model, prompt)
        self.seconds.append(time.perf_counter() - begin)
        tokens = row[len(prompt) :].tolist()
        eos = model.config.eos_token_id
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        self.correct += text == problem.answer
        self.tokens += length
        self.nfe += nfe

    def summary(self, prompts: int, baseline_rate: float | None) -> dict[str, Any]:
        """The method's row of the table."""
        rate = self.tokens / sum(self.seconds)
        return {
            "method": self.name,
            "cache": self.cache,
            "rule": self.rule,
            "accuracy": self.correct / prompts,
            "nfe": self.nfe / prompts,
            "tokens_per_forward": self.tokens / self.nfe,
            "tokens_per_second": rate,
            "speedup": rate / (baseline_rate or rate),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def methods() -> list[Method]:
    """The baseline, then every cache mode under every rule."""

    def patched(cache: str, rule: dict[str, Any]) -> Callable[[Any, Tensor], tuple[Tensor, int]]:
        def run(model: Any, prompt: Tensor) -> tuple[Tensor, int]:
            output = generate(
                model, [prompt], gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, cache=cache, **rule
            )
            return output.sequences[0], int(output.nfe[0])

        return run

    def unpatched(model: Any, prompt: Tensor) -> tuple[Tensor, int]:
        return baseline(model, prompt, GEN_LENGTH, BLOCK_LENGTH)

    first = Method("unpatched", "none", "one a step", unpatched, patched=False)
    return [
        first,
        *(Method(f"{c}, {name}", c, name, patched(c, rule)) for c in CACHES for name, rule in RULES.items()),
    ]


def run(out: Path, prompts: int, seed: int) -> int:
    """Shows each family's longest answer emerge, then measures; writes JSON and pictures to ``out``."""
    if prompts < 1:
        print(f"fastdllm-ext demo: --prompts {prompts}; takes 1 or more", file=sys.stderr)
        return 2
    loaded: tuple[Any, Any] = load(demo_model_path(), device="cpu")
    model, tokenizer = loaded
    problems = held_out(prompts, seed)
    print(f"Demo model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, float32, CPU\n")
    longest = {p.family: p for p in sorted(problems, key=lambda p: len(p.answer))}
    shown = [(problem, show(model, tokenizer, problem)) for problem in longest.values()]

    table = methods()
    for method in table:  # first calls allocate and warm caches; they are not counted
        method.answer(model, tokenizer, problems[0])
    table = methods()
    for problem in tqdm(
        problems, desc="answering", unit="prompt", mininterval=0.2 if sys.stderr.isatty() else 20
    ):
        for method in table:  # every method on a prompt before the next prompt: like beside like
            method.answer(model, tokenizer, problem)
    patch(model)

    base = table[0].summary(len(problems), None)
    results = [base, *(m.summary(len(problems), base["tokens_per_second"]) for m in table[1:])]
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"fastdllm-ext demo --prompts {prompts} --seed {seed}",
        "environment": collect_env(),
        "conditions": {
            "model": "demo_model",
            "dtype": "float32",
            "batch": 1,
            "prompts": len(problems),
            "seed": seed,
            "gen_length": GEN_LENGTH,
            "block_length": BLOCK_LENGTH,
            "tokens": "up to and including EOS",
            "order": "methods interleaved by prompt",
        },
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\n" + format_table(results, len(problems)))
    print(f"\nWrote {out / 'demo.json'}", end="")
    try:
        from fastdllm_ext.plots import plot_demo, plot_denoising
    except ImportError:
        print('; no pictures: matplotlib is not installed (pip install "fastdllm_ext[plot]")')
        return 0
    plot_demo(facts, out / "demo.png")
    problem, output = max(shown, key=lambda pair: int(pair[1].nfe[0]))
    answer = output.answers()[0]
    plot_denoising(
        f"{problem.prompt}    {len(answer)} tokens in {int(output.nfe[0])} forwards",
        [tokenizer.decode([token], skip_special_tokens=True) or "∎" for token in answer.tolist()],
        output.step_map[0, : len(answer)].tolist(),
        output.confidence[0, : len(answer)].tolist(),
        out / "denoising.png",
    )
    print(f", {out / 'demo.png'} and {out / 'denoising.png'}")
    return 0


def show(model: Any, tokenizer: Any, problem: Problem) -> GenerationOutput:
    """Prints a prompt, and its answer as it is denoised."""
    prompt = torch.tensor(tokenizer(problem.prompt)["input_ids"])
    print(f"> {problem.prompt}")
    view = DenoisingView(tokenizer, GEN_LENGTH, eos_ids=(model.config.eos_token_id,))
    output = generate(
        model, [prompt], gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, threshold=0.99, streamer=view
    )
    text = tokenizer.decode(output.answers()[0], skip_special_tokens=True)
    verdict = "right" if text == problem.answer else f"wrong, should be {problem.answer!r}"
    tokens, nfe = int(output.lengths[0] - output.prompt_lengths[0]), int(output.nfe[0])
    print(f"  {tokens} tokens in {nfe} forwards: {verdict}\n")
    return output


def format_table(results: list[dict[str, Any]], prompts: int) -> str:
    """The results as aligned columns, with what they were measured on."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("cache", lambda r: "unpatched" if r["method"] == "unpatched" else r["cache"]),
        ("rule", lambda r: r["rule"]),
        ("accuracy", lambda r: f"{100 * r['accuracy']:.1f}%"),
        ("NFE", lambda r: f"{r['nfe']:.1f}"),
        ("tokens/forward", lambda r: f"{r['tokens_per_forward']:.2f}"),
        ("tokens/s", lambda r: f"{r['tokens_per_second']:.0f}"),
        ("speed-up", lambda r: f"{r['speedup']:.1f}x"),
    ]
    rows = [[name for name, _ in columns], *([text(r) for _, text in columns] for r in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(
        [
            *lines,
            f"{prompts} held-out prompts one at a time, float32, gen_length {GEN_LENGTH}, block_length "
            f"{BLOCK_LENGTH}; tokens up to and including EOS.",
        ]
    )
