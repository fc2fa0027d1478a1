"""What does a user gain? Generations beside the uncached loop, and beside the published implementation.

    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end-cpu.json --reference PATH

The plain loop is the published one for LLaDA on the unpatched model: for every token a forward over the whole
row, softmax in float64 over every position, no cache, no stop at the end, one row after the other. It is
measured over a few of its steps, which all do the same work, and extrapolated: ``extrapolated_from_steps``
says from how many.

PATH is a checkout of NVlabs/Fast-dLLM, whose code for LLaDA runs with the same weights, prompt and schedule
in turns with ours. It is written for transformers 4.49. Tokens are compared as well. Random weights give
confidences that agree in six digits now and then, which float32 cannot tell apart whatever the order of
sums: a case with such a tie goes another way from there on, in any two implementations.

Random weights never reach a confidence of 0.9, so the schedule is fixed: so many tokens a step.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdllm_ext as fd
from common import (
    BLOCK,
    DTYPES,
    EOS,
    Results,
    Shape,
    dtypes_of,
    llada_settings,
    make_model,
    parser_for,
    random_prompts,
    shape_of,
    steps_for,
    summary,
    timed,
)

LOOP_STEPS = 4  # of the plain loop that are measured, for one sample
PUBLISHED = {
    "none": "generate",
    "prefix": "generate_with_prefix_cache",
    "dual": "generate_with_dual_cache",
}


@dataclass(frozen=True)
class Case:
    """Prompts of one length, and what is generated.

    Attributes:
        full: with every candidate, the slow ones too.
        brief: with dual cache alone.
        eos: with a candidate that stops at an EOS as well.
        narrow: not in float32, which takes long.
    """

    prompt: int
    gen_length: int
    batch: int = 1
    full: bool = False
    brief: bool = False
    eos: bool = False
    narrow: bool = False

    def __str__(self) -> str:
        return f"prompt {self.prompt}, gen_length {self.gen_length}, batch {self.batch}"


CASES = {
    "cpu": [
        Case(128, 128, full=True), Case(512, 128), Case(512, 256, eos=True, narrow=True),
        Case(128, 128, batch=4, brief=True, narrow=True), Case(128, 128, batch=16, brief=True, narrow=True),
    ],
    "cuda": [
        Case(1400, 1024, brief=True, eos=True), Case(900, 256), Case(900, 256, batch=16, brief=True),
        Case(150, 256, full=True), Case(900, 512, brief=True), Case(900, 256, batch=4, brief=True),
        Case(1400, 256), Case(150, 512),
    ],
}  # fmt: skip


@dataclass
class Candidate:
    """One way to fill the rows.

    Attributes:
        run: seconds of every forward where it is extrapolated, else of the generation; rows; forwards.
        forwards: of a whole generation, where ``run`` takes fewer.
    """

    implementation: str
    cache: str
    runtime: str
    tokens_per_step: float
    steps: int
    run: Callable[[int, int], tuple[list[float], Tensor | None, int]]  # (gen_length, steps)
    forwards: int = 0
    eos_id: int = EOS

    @property
    def settings(self) -> tuple[str, float, int]:
        """Those that the tokens depend on."""
        return self.cache, self.tokens_per_step, self.eos_id

    @property
    def name(self) -> str:
        """As it is printed."""
        eos = ", EOS" if self.eos_id != EOS else ""
        runtime = f" {self.runtime}" if self.runtime else ""
        return f"{self.implementation}{runtime}, {self.cache}, {self.tokens_per_step:g} a step{eos}"


Theirs = Callable[[Tensor, Case, str, float], Candidate]  # of prompts, cache mode and tokens a step


# ---------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_loop(model: Any, rows: Tensor, start: int, steps: int, device: str) -> list[float]:
    """Seconds of each of the first ``steps`` steps of the uncached loop: one token of every row, in place.

    rows [B, P + G], of which [start, P + G) are masks.
    """
    mask_id = model.config.mask_token_id

    def step(number: int) -> None:
        end = start + (number // BLOCK + 1) * BLOCK
        for row in rows:  # the published loop takes one row
            scores = model(row[None]).logits[0]
            candidate = scores.argmax(-1)
            chance = scores.double().softmax(-1).gather(-1, candidate[:, None])[:, 0]
            fillable = row == mask_id
            fillable[end:] = False
            best = torch.where(fillable, chance, -math.inf).argmax()
            row[best] = candidate[best]

    return [timed(lambda number=number: step(number), device)[0] for number in range(steps)]


def plain(model: Any, prompts: Tensor, gen_length: int, device: str) -> Candidate:
    """The uncached loop."""

    def run(gen_length: int, steps: int) -> tuple[list[float], None, int]:
        masks = torch.full((len(prompts), gen_length), model.config.mask_token_id, device=device)
        rows, start = torch.cat((prompts, masks), dim=1), prompts.shape[1]
        return plain_loop(model, rows, start, min(LOOP_STEPS, gen_length), device), None, gen_length

    return Candidate("plain loop", "none", "", 1, gen_length, run, forwards=gen_length)


def ours(model: Any, prompts: Tensor, case: Case, cache: str, runtime: str, rate: float) -> Candidate:
    """``fd.generate``."""
    device = prompts.device.type

    def run(gen_length: int, steps: int, eos_id: int = EOS) -> tuple[list[float], Tensor, int]:
        fd.patch(model, runtime=runtime)  # type: ignore[arg-type]
        seconds, output = timed(
            lambda: fd.generate(
                model, prompts, gen_length=gen_length, block_length=BLOCK, steps=steps, cache=cache,
                stop_on_eos=eos_id != EOS, eos_token_id=eos_id,
            ),
            device,
        )  # fmt: skip
        return [seconds], output.sequences, int(output.nfe.max())

    return Candidate("fastdllm_ext", cache, runtime, rate, steps_for(case.gen_length, rate), run)


def stopping(base: Candidate, row: Tensor, prompt: int, near: int) -> tuple[Candidate, int] | None:
    """The same with an EOS: a token that comes up first after about ``near`` tokens of the answer."""
    answer = row[prompt:].tolist()
    places = [i for i, token in enumerate(answer) if answer.index(token) == i]
    where = min(places, key=lambda i: abs(i + 1 - near))
    if abs(where + 1 - near) > near // 4:
        return None
    eos_id = answer[where]

    def run(gen_length: int, steps: int) -> tuple[list[float], Tensor | None, int]:
        inner: Any = base.run
        return inner(gen_length, steps, eos_id)

    return replace(base, run=run, eos_id=eos_id), where + 1


class Published:
    """NVlabs' LLaDA from a checkout, with our model's weights (the same memory)."""

    def __init__(self, checkout: Path, shape: Shape) -> None:
        folder = checkout / "llada"
        self.shape = shape
        with imported_from(folder):
            self._config = importlib.import_module("model.configuration_llada").LLaDAConfig
            self._model = importlib.import_module("model.modeling_llada").LLaDAModelLM
            self._generate = importlib.import_module("generate")
        names = ("generate.py", "model/modeling_llada.py")
        self.digests = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest()[:16] for n in names}

    def candidates_of(self, model: Any, dtype: torch.dtype, device: str) -> Theirs:
        """What makes candidates of its model with our model's parameters."""
        fd.patch(model, runtime="fused")
        prompt = random_prompts(self.shape, 1, 1, device)
        fd.generate(model, prompt, gen_length=1)  # which joins weights: from here on they stay in place
        with torch.device("meta"):
            theirs = self._model(self._config(**llada_settings(self.shape), init_device="meta"))
        theirs.to(dtype).load_state_dict(model.state_dict(), assign=True)
        theirs.config.init_device = device
        left = [n for n, t in (*theirs.named_parameters(), *theirs.named_buffers()) if t.is_meta]
        if left:
            raise ValueError(f"not in the state dict: {', '.join(left)}")
        make = partial(self._candidate, theirs.eval())
        for cache in PUBLISHED:  # which not every version of transformers lets run
            make(prompt, Case(1, BLOCK), cache, BLOCK).run(BLOCK, 2)
        return make

    def _candidate(self, theirs: Any, prompts: Tensor, case: Case, cache: str, rate: float) -> Candidate:
        function = getattr(self._generate, PUBLISHED[cache])
        device = prompts.device.type

        def run(gen_length: int, steps: int) -> tuple[list[float], Tensor, int]:
            seconds, (rows, nfe) = timed(
                lambda: function(
                    theirs, prompts, steps=steps, gen_length=gen_length, block_length=BLOCK,
                    mask_id=self.shape.mask_id,
                ),
                device,
            )  # fmt: skip
            return [seconds], rows, nfe

        return Candidate("published", cache, "", rate, steps_for(case.gen_length, rate), run)


def describe(error: Exception) -> str:
    """Its first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """Within it ``model`` and ``generate`` are the folder's; after it, paths and modules are as before."""
    names = [n for n in sys.modules if n.split(".")[0] in ("model", "generate")]
    paths, modules = sys.path[:], {n: sys.modules.pop(n) for n in names}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in [n for n in sys.modules if n.split(".")[0] in ("model", "generate")]:
            del sys.modules[name]
        sys.modules.update(modules)


# ---------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------


def our_candidates(model: Any, prompts: Tensor, case: Case, rate: float) -> list[Candidate]:
    """What matters most first: with dual cache; then, unless the case is brief, the other cache modes."""
    found = [ours(model, prompts, case, "dual", runtime, rate) for runtime in ("fused", "modules")]
    if case.brief:
        return found
    found += [ours(model, prompts, case, cache, "fused", rate) for cache in ("prefix", "none")]
    found.append(ours(model, prompts, case, "dual", "fused", 1))
    if case.full:
        found += [ours(model, prompts, case, cache, "modules", rate) for cache in ("prefix", "none")]
        found += [ours(model, prompts, case, cache, "fused", 1) for cache in ("prefix", "none")]
    return found


def measure(
    case: Case, candidates: list[Candidate], repeats: int, seconds: float
) -> list[tuple[list[float], Tensor | None, int]]:
    """(samples, rows, forwards) of each, in turns; one whose time is up takes part no more."""
    torch._dynamo.reset()  # so that published code, which compiles its attention, does so for every case
    for c in candidates:  # first calls allocate, load libraries and compile; they are not counted
        length = case.gen_length if c.implementation == "published" else min(BLOCK, case.gen_length)
        c.run(length, steps_for(length, c.tokens_per_step))
    found: list[tuple[list[float], Tensor | None, int]] = [([], None, 0) for _ in candidates]
    for _ in range(repeats):
        for i, c in enumerate(candidates):
            few = len(found[i][0]) < (3 if c.cache == "dual" and c.runtime != "modules" else 1)
            if few or sum(found[i][0]) < seconds:
                samples, rows, nfe = c.run(case.gen_length, c.steps)
                found[i] = (found[i][0] + samples, rows, nfe)
    return found


def share_equal(rows: Tensor | None, others: Tensor | None, prompt: int) -> float | None:
    """Share of the answers' tokens that are equal."""
    if rows is None or others is None or rows.shape != others.shape:
        return None
    return float((rows[:, prompt:] == others[:, prompt:]).float().mean())


def row_of(
    case: Case, shape: Shape, dtype: str, candidate: Candidate, samples: list[float], nfe: int, tokens: int
) -> dict[str, Any]:
    """A row of results. ``tokens``: of each answer, up to EOS where it stops there."""
    found = summary(samples)
    per_sample = "generation"
    if candidate.forwards:  # samples are those of single forwards
        per_sample = "forward"
        found["median_s"] *= candidate.forwards
        found["quartiles_s"] = [candidate.forwards * s for s in found["quartiles_s"]]
    return {
        "implementation": candidate.implementation,
        "cache": candidate.cache,
        "runtime": candidate.runtime,
        "tokens_per_step": candidate.tokens_per_step,
        "steps": candidate.steps,
        "stops_at_eos": candidate.eos_id != EOS,
        "model": shape.name,
        "dtype": dtype,
        "batch": case.batch,
        "prompt": case.prompt,
        "gen_length": case.gen_length,
        "block_length": BLOCK,
        "nfe": nfe,
        "tokens": tokens,
        "tokens_per_second": case.batch * tokens / found["median_s"],
        "extrapolated_from_steps": len(samples) if candidate.forwards else None,
        "sample": per_sample,
        **found,
    }


def run_case(
    case: Case, shape: Shape, dtype: str, model: Any, theirs: Theirs | None, args: Any, results: Results
) -> bool:
    """Measures a case; whether tokens that must be equal are."""
    device = args.device
    prompts = random_prompts(shape, case.batch, case.prompt, device)
    rate = args.tokens_per_step
    candidates = [plain(model, prompts, case.gen_length, device)]
    candidates += our_candidates(model, prompts, case, rate)
    if theirs is not None and case.batch == 1:
        caches = ("dual",) if case.brief else ("dual", "prefix", *["none"] * case.full)
        candidates += [theirs(prompts, case, cache, rate) for cache in caches]
    found = measure(case, candidates, args.repeats, args.seconds_each)
    tokens = [case.gen_length] * len(candidates)
    if case.eos:
        near = max(1, round(230 * case.gen_length / 1024))
        rows: Any = found[1][1]
        stop = stopping(candidates[1], rows[0], case.prompt, near)
        if stop is None:
            results.miss(f"EOS after {near} of {case.gen_length} tokens, {dtype}", "no token comes up there")
        else:
            candidates.append(stop[0])
            tokens.append(stop[1])
            found += measure(case, [stop[0]], args.repeats, args.seconds_each)

    base = statistics.median(found[0][0]) * case.gen_length
    print(f"\n{shape.name} {dtype}, {case}")
    is_right = True
    rows_found = []
    for c, count, (samples, rows, nfe) in zip(candidates, tokens, found, strict=True):
        row = row_of(case, shape, dtype, c, samples, nfe, count)
        row["speedup_over_loop"] = base / row["median_s"]
        row["tokens_equal"] = {}
        for other, (_, other_rows, _) in zip(candidates, found, strict=True):
            alike = (other.cache, other.tokens_per_step, other.eos_id) == (
                c.cache,
                c.tokens_per_step,
                c.eos_id,
            )
            share = share_equal(rows, other_rows, case.prompt) if alike and other is not c else None
            if share is not None:
                row["tokens_equal"][other.name] = share
                is_right &= not (dtype == "float32" and "published" in other.name and share < 1)
        rows_found.append(row)
        low, high = row["quartiles_s"]
        equal = "".join(f"  {100 * s:.0f}% = {name.split(',')[0]}" for name, s in row["tokens_equal"].items())
        print(
            f"  {c.name:<46} {row['median_s']:9.3f} s [{low:.3f}, {high:.3f}] n {len(samples):<3} "
            f"NFE {nfe:<5} {row['tokens_per_second']:8.1f} tokens/s {row['speedup_over_loop']:7.2f}x"
            f"{' extrapolated' if c.forwards else ''}{equal}",
            flush=True,
        )
    results.add(*rows_found)
    return is_right


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=7)
    parser.add_argument("--reference", type=Path, metavar="PATH", help="a checkout of NVlabs/Fast-dLLM")
    parser.add_argument("--tokens-per-step", type=float, help="default: 4; on CUDA 3.2, 10 steps a block")
    parser.add_argument(
        "--seconds-each", type=float, default=4, help="a candidate that has taken so long is done"
    )
    args = parser.parse_args()
    args.tokens_per_step = args.tokens_per_step or (3.2 if args.device == "cuda" else 4)
    shape = shape_of(args)
    cases = CASES[args.device]
    if args.quick:
        args.repeats, cases = 2, [cases[0]] if args.device == "cuda" else [Case(24, 64, full=True, eos=True)]
    results = Results(
        args, "What does a user gain?", block_length=BLOCK, repeats=args.repeats, order="interleaved",
        seconds_each=args.seconds_each, weights="random", loop_steps_a_sample=LOOP_STEPS,
    )  # fmt: skip
    published = None
    if args.reference is None:
        results.miss("published implementation", "no --reference PATH")
    elif shape.family != "llada":
        results.miss("published implementation", f"--reference runs LLaDA alone, not {shape.name}")
    else:
        try:
            published = Published(args.reference, shape)
        except Exception as error:  # whatever it is that stands in the way
            results.miss("published implementation", describe(error))
        else:
            results.extra["reference"] = {"project": "NVlabs/Fast-dLLM", "sha256": published.digests}
    is_right = True
    models, theirs = {}, {}
    for dtype in dtypes_of(args, "bfloat16", "float32"):
        models[dtype] = make_model(shape, DTYPES[dtype], args.device)
        if published is not None:
            try:
                theirs[dtype] = published.candidates_of(models[dtype], DTYPES[dtype], args.device)
            except Exception as error:
                results.miss(f"published implementation, {dtype}", describe(error))
    for case in cases:
        for dtype, model in models.items():
            if case.narrow and dtype == "float32":
                continue
            if results.is_late:
                results.miss(f"{dtype}, {case}", "the time was up")
                continue
            torch.manual_seed(0)
            is_right &= run_case(case, shape, dtype, model, theirs.get(dtype), args, results)
    if not is_right:
        print("in float32 some tokens are not those of the published implementation: a tie, or a fault")


if __name__ == "__main__":
    main()
