"""What do fewer bits gain, and what do they cost? Speed on random weights, accuracy on the demo model.

    python benchmarks/precision.py --out benchmarks/results/precision-cpu.json

Speed: a generation of a fixed schedule with dual cache by every option of ``fd.patch`` that the device takes,
in turns. Seconds are those of the whole generation; a block step and a refresh are medians over all of them,
the device's work included.

Accuracy: held-out prompts of the demo model in batches, by the same options; the share that is answered
right, and the share whose answer is, token for token, that of the same dtype without any option. fp8 products
take a bfloat16 model; on a CPU, which has no arithmetic for them, accuracy alone is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdllm_ext as fd
from common import (
    BLOCK,
    DTYPES,
    Results,
    Shape,
    dtypes_of,
    make_model,
    parser_for,
    random_prompts,
    shape_of,
    step_seconds,
    steps_for,
    summary,
    timed,
    watched_turns,
)
from fastdllm_ext.demo_tasks import Problem, held_out

TOKENS_PER_STEP, GEN_LENGTH = 4, 128
RULES: dict[str, dict[str, Any]] = {
    "threshold 0.9": {"threshold": 0.9},
    "quota, 4 a step": {"steps": GEN_LENGTH // 4},
}
BATCH = 25

Options = dict[str, Any]


def options_for(dtype: str, device: str, speed: bool) -> list[Options]:
    """What ``fd.patch`` can be told, the plain model first."""
    quantizations = ["none"]
    if device == "cpu" and dtype != "float16":
        quantizations.append("int8")
    if dtype == "bfloat16" and not (speed and device == "cpu"):
        quantizations.append("fp8")
    return [{"quantization": q, "kv_cache_dtype": kv} for q in quantizations for kv in ("auto", "fp8")]


def measure_speed(shape: Shape, dtype: str, prompt: int, args: Any) -> Iterator[dict[str, Any]]:
    """A row of results for each option."""
    model = make_model(shape, DTYPES[dtype], args.device)
    prompts = random_prompts(shape, 1, prompt, args.device)
    found = options_for(dtype, args.device, speed=True)

    def generate() -> Any:
        return fd.generate(
            model, prompts, gen_length=GEN_LENGTH, block_length=BLOCK, cache="dual", stop_on_eos=False,
            steps=steps_for(GEN_LENGTH, TOKENS_PER_STEP),
        )  # fmt: skip

    seconds: dict[int, list[float]] = {i: [] for i in range(len(found))}
    turns: dict[int, list[Any]] = {i: [] for i in range(len(found))}
    # Copies of fewer bits are made at the change of an option: each option's calls come one after the other,
    # and the options take turns.
    for _ in range(args.repeats):
        for i, options in enumerate(found):
            fd.patch(model, **options)
            generate()  # makes the copies, and warms
            for _ in range(args.calls):
                with watched_turns(args.device) as watched:
                    seconds[i].append(timed(generate, args.device)[0])
                turns[i] += watched
    plain = statistics.median(seconds[0])
    for i, options in enumerate(found):
        yield {
            "question": "speed", "model": shape.name, "dtype": dtype, **options, "prompt": prompt,
            "gen_length": GEN_LENGTH, "tokens_per_step": TOKENS_PER_STEP, "total": summary(seconds[i]),
            "block_step": summary(step_seconds(turns[i], refresh=False)),
            "refresh": summary(step_seconds(turns[i], refresh=True)),
            "speedup": plain / statistics.median(seconds[i]),
        }  # fmt: skip


def answers(
    model: Any, tokenizer: Any, problems: list[Problem], rule: dict[str, Any], device: str
) -> tuple[int, float, list[Tensor]]:
    """(answered right, forwards a prompt, rows)."""
    right, forwards, rows = 0, 0, []
    for begin in range(0, len(problems), BATCH):
        some = problems[begin : begin + BATCH]
        prompts = [torch.tensor(tokenizer(p.prompt)["input_ids"], device=device) for p in some]
        output = fd.generate(model, prompts, gen_length=GEN_LENGTH, block_length=BLOCK, cache="dual", **rule)
        forwards += int(output.nfe.sum())
        for problem, answer in zip(some, output.answers(), strict=True):
            right += tokenizer.decode(answer, skip_special_tokens=True) == problem.answer
            rows.append(answer.cpu())
    return right, forwards / len(problems), rows


def measure_accuracy(dtype: str, results: Results, args: Any) -> Iterator[dict[str, Any]]:
    """A row of results for each rule and option."""
    loaded: tuple[Any, Any] = fd.load(fd.demo_model_path(), dtype=DTYPES[dtype], device=args.device)
    model, tokenizer = loaded
    problems = held_out(args.prompts, args.seed)
    for name, rule in RULES.items():
        plain: list[Tensor] = []
        for options in options_for(dtype, args.device, speed=False):
            try:
                fd.patch(model, **options)
            except ValueError as reason:
                results.miss(f"accuracy, {dtype}, {options}", str(reason))
                continue
            right, nfe, rows = answers(model, tokenizer, problems, rule, args.device)
            plain = plain or rows
            equal = sum(torch.equal(a, b) for a, b in zip(rows, plain, strict=True))
            yield {
                "question": "accuracy", "model": "demo_model", "dtype": dtype, "rule": name, **options,
                "prompts": len(problems), "right": right, "accuracy": right / len(problems), "nfe": nfe,
                "rows_equal": equal / len(problems),
            }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=3)
    parser.add_argument("--calls", type=int, default=2, help="generations of an option before the next one")
    parser.add_argument("--prompts", type=int, default=300, help="of the demo model")
    parser.add_argument("--seed", type=int, default=0, help="of the demo model's prompts")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.calls, args.prompts = 1, 1, 4
    shape = shape_of(args)
    results = Results(
        args, "What do fewer bits gain, and what do they cost?", cache="dual", block_length=BLOCK, batch=1,
        repeats=args.repeats, calls=args.calls, order="interleaved", weights="random",
        accuracy={"model": "demo_model", "batch": BATCH, "gen_length": GEN_LENGTH, "seed": args.seed},
    )  # fmt: skip
    dtypes = dtypes_of(args, "bfloat16", "float32")
    for dtype in dtypes:
        for row in measure_accuracy(dtype, results, args):
            results.add(row)
            print(f"{_options(row)}, {row['rule']}: {100 * row['accuracy']:.1f}% right, "
                  f"{100 * row['rows_equal']:.1f}% rows equal")  # fmt: skip
    torch.manual_seed(0)
    for dtype in dtypes:
        for prompt in (128,) if args.quick else (512, 1920):
            if results.is_late:
                results.miss(f"speed, {dtype}, prompt {prompt}", "the time was up")
                continue
            for row in measure_speed(shape, dtype, prompt, args):
                results.add(row)
                print(f"{_options(row)}, prompt {prompt}: {row['total']['median_s']:.3f} s, "
                      f"{row['speedup']:.2f}x")  # fmt: skip


def _options(row: dict[str, Any]) -> str:
    return f"{row['dtype']}, weights {row['quantization']}, keys and values {row['kv_cache_dtype']}"


if __name__ == "__main__":
    main()
