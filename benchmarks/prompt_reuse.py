"""What does it cost to take the keys of a prompt's beginning from another request (``reuse_prompts``)?

    python benchmarks/prompt_reuse.py --out benchmarks/results/prompt_reuse-cpu.json

The bundled model's held-out problems, each asked after a *sibling*: the same first tokens, another end, so
that the answer differs. Once every request computes all of its keys, and once it takes the sibling's for the
pages that begin alike. This is harder than a common system prompt: most of the question is taken over.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import fastdllm_ext as fd
from common import Results, parser_for
from fastdllm_ext.demo_tasks import Problem, held_out
from fastdllm_ext.engine import Completion
from fastdllm_ext.eval.statistics import wilson

PAGE = 16
CASES = ("another end", "another length", "the same")


@dataclass(frozen=True)
class Case:
    """A problem, and what is asked before it."""

    problem: Problem
    sibling: str
    sibling_length: int


def sibling_of(rng: random.Random, prompt: str) -> str:
    """The same prompt with other digits, or other words, in its last third."""
    words = prompt.rstrip(".?").split()
    first = len(words) * 2 // 3
    pool = words[1:]

    def other(word: str) -> str:
        if word.isdigit():
            return word[:-2] + "".join(rng.choice("123456789") for _ in word[-2:])
        return rng.choice(pool) if prompt.startswith("Reverse") else word

    return " ".join([*words[:first], *map(other, words[first:])]) + prompt[len(prompt.rstrip(".?")) :]


def cases(name: str, problems: list[Problem], gen_length: int) -> list[Case]:
    """Of each problem, one."""
    rng = random.Random(name)
    if name == "another end":
        return [Case(p, sibling_of(rng, p.prompt), gen_length) for p in problems]
    return [Case(p, p.prompt, gen_length // 2 if name == "another length" else gen_length) for p in problems]


def answer(model: Any, tokenizer: Any, case: Case, reuse: bool, gen_length: int) -> tuple[Completion, int]:
    """The answer to the problem after its sibling's, and how many positions were taken over."""
    with fd.Engine(model, tokenizer, num_pages=64, page_size=PAGE, reuse_prompts=reuse) as engine:
        engine.submit(engine.encode(case.sibling), gen_length=case.sibling_length).result()
        found = engine.submit(engine.encode(case.problem.prompt), gen_length=gen_length).result()
        return found, engine.stats.reused_tokens


def compare(cases: list[Case], model: Any, tokenizer: Any, gen_length: int) -> dict[str, Any]:
    """Problems of one case, with and without."""
    right, reused, prompt_tokens, same, nfe = [0, 0], 0, 0, 0, [0, 0]
    counted = 0
    difference: list[float] = []
    for case in cases:
        computed, _ = answer(model, tokenizer, case, False, gen_length)
        taken, positions = answer(model, tokenizer, case, True, gen_length)
        if not positions:
            continue  # they part before the first page is full
        counted += 1
        reused, prompt_tokens = reused + positions, prompt_tokens + taken.prompt_length
        same += computed.tokens == taken.tokens
        for i, completion in enumerate((computed, taken)):
            right[i] += completion.text == case.problem.answer
            nfe[i] += completion.nfe
        difference += [abs(a - b) for a, b in zip(computed.confidence, taken.confidence, strict=False)]
    if counted == 0:
        raise ValueError("no problem and its sibling have a page in common")
    return {
        "problems": counted,
        "prompt_tokens": prompt_tokens,
        "reused_tokens": reused,
        "right": [wilson(n, counted).to_list() for n in right],
        "same_answer": wilson(same, counted).to_list(),
        "nfe": nfe,
        "mean_confidence_difference": sum(difference) / max(1, len(difference)),
    }


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=1)
    parser.add_argument("--problems", type=int, default=600, help="held-out problems (600)")
    args = parser.parse_args()
    model, tokenizer = fd.load(fd.demo_model_path(), device=args.device)
    gen_length = 128
    problems = held_out(30 if args.quick else args.problems, seed=7)
    results = Results(args, "What does it cost to take over keys of another request's prompt?",
                      model="demo", gen_length=gen_length, page_size=PAGE)  # fmt: skip
    for name in CASES:
        row = {"case": name, **compare(cases(name, problems, gen_length), model, tokenizer, gen_length)}
        results.add(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
