"""What the benchmarks share: facts about the machine, clocks, models of random weights, the file of results.

Results hold every sample. Speeds are compared within one run only, whose candidates take turns (A B A B ...).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fastdllm_ext as fd
from fastdllm_ext import _C
from fastdllm_ext.decoder import Decoder
from fastdllm_ext.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from fastdllm_ext.rows import DecodingRow

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 32
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. ``head_dim`` is hidden / heads."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    mask_id: int
    positions: int = 65536
    rope_theta: float = 500000.0

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        kv = self.kv_heads * self.head_dim
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.inner)

    def block_step_bytes(self, batch: int, block: int, context: int, size: int) -> dict[str, int]:
        """What a block step must read or write once, by part; ``size`` bytes a number."""
        kv = 2 * self.layers * batch * context * self.kv_heads * self.head_dim * size
        return {
            "layer_weights": self.layers * self.layer_weights * size,
            "head": self.hidden * self.vocab * size,
            "kv": kv,
            "logits": 2 * batch * block * self.vocab * size,
        }

    def refresh_flop(self, batch: int, block: int, context: int) -> int:
        """Operations of a refresh; the head, and the last layer behind its keys, run on the block alone."""
        kv = self.kv_heads * self.head_dim
        whole, asked = batch * context, batch * min(block, context)
        keys_and_queries = self.hidden * (self.hidden + 2 * kv)
        behind = self.layer_weights - keys_and_queries
        computed = (self.layers - 1) * whole + asked  # rows of all layers that go through attention and MLP
        products = (
            self.layers * whole * keys_and_queries + computed * behind + asked * self.hidden * self.vocab
        )
        return 2 * products + 4 * computed * context * self.hidden


SHAPES = {
    s.name: s
    for s in (
        Shape("tiny", "llada", 64, 2, 4, 4, 96, 256, 255),
        Shape("small", "llada", 512, 8, 8, 8, 1536, 32000, 31999),
        Shape("llada-8b", "llada", 4096, 32, 32, 32, 12288, 126464, 126336),
        Shape("dream-tiny", "dream", 64, 2, 4, 2, 96, 256, 255),
        Shape("dream-small", "dream", 512, 8, 8, 2, 1536, 32000, 31999, rope_theta=1e6),
        Shape("dream-7b", "dream", 3584, 28, 28, 4, 18944, 152064, 151666, 131072, 1e6),
    )
}
EOS, PAD = 1, 0

# What every official config.json of LLaDA says, and the published class does not take for granted.
LLADA_KEYS: dict[str, Any] = {
    "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
    "rope_full_precision": True, "rms_norm_eps": 1e-5, "weight_tying": False, "include_bias": False,
    "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_dropout": 0.0,
    "embedding_dropout": 0.0, "residual_dropout": 0.0, "use_cache": False,
}  # fmt: skip


def llada_settings(shape: Shape) -> dict[str, Any]:
    """The keys of a LLaDA configuration."""
    return LLADA_KEYS | {
        "d_model": shape.hidden, "n_layers": shape.layers, "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads, "mlp_hidden_size": shape.inner,
        "vocab_size": shape.vocab, "embedding_size": shape.vocab,
        "max_sequence_length": shape.positions, "rope_theta": shape.rope_theta,
        "mask_token_id": shape.mask_id, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip


def llada(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A LLaDA with random weights. See :func:`make_model`."""
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**llada_settings(shape)))
    return _with_random_weights(model, shape, dtype, device)


def dream(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A Dream with random weights. See :func:`make_model`."""
    config = DreamConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.inner, vocab_size=shape.vocab,
        max_position_embeddings=shape.positions, rope_theta=shape.rope_theta, mask_token_id=shape.mask_id,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.device("meta"):
        model = DreamModel(config)
    return _with_random_weights(model, shape, dtype, device)


def make_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A patched model with random weights, made where it lies and in its dtype.

    It never produces [MASK]: the mask's row of the head is zero, and so far from the largest logit.
    """
    return fd.patch((llada if shape.family == "llada" else dream)(shape, dtype, device))


@torch.no_grad()
def _with_random_weights(model: nn.Module, shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(std=1.0 if "wte" in name or "embed" in name else 1.6 / p.shape[1] ** 0.5)
        elif name.endswith("bias"):
            p.normal_(std=0.5)
        else:
            p.fill_(1.0)
    head: Any = model
    head.get_output_embeddings().weight[shape.mask_id].zero_()
    return model


def random_prompts(shape: Shape, batch: int, length: int, device: str) -> Tensor:
    """[batch, length] token ids, none of them special."""
    return torch.randint(2, min(shape.mask_id, shape.vocab), (batch, length), device=device)


def steps_for(gen_length: int, tokens_per_step: float, block: int = BLOCK) -> int:
    """``steps`` of a fixed schedule: every block takes as many, so that published code takes it as well."""
    return -(-gen_length // block) * max(2, math.ceil(block / tokens_per_step))


# ---------------------------------------------------------------------------------------------------------
# Clocks
# ---------------------------------------------------------------------------------------------------------


def synchronise(device: str) -> None:
    """Waits until a CUDA device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], T], device: str) -> tuple[float, T]:
    """(seconds, result) of a call, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result


def interleaved(
    calls: dict[str, Callable[[], float]], repeats: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """What each call returns, A B A B ...; one whose samples add up to ``seconds`` takes part no more."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if sum(samples[name]) < seconds:
                samples[name].append(call())
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles (of one sample, that one) beside the samples, in seconds."""
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples[:1] * 3
    return {
        "median_s": statistics.median(samples),
        "quartiles_s": [low, high],
        "samples_s": list(samples),
    }


@dataclass(frozen=True)
class Turn:
    """A turn of the decoder: whether rows refreshed in it, the steps it took, its seconds."""

    is_refresh: bool
    steps: int
    seconds: float


@contextmanager
def watched_turns(device: str, name: str | None = None) -> Iterator[list[Turn]]:
    """The turns that generations take within it, each timed with the device's work included.

    With a name, torch's profiler sees each as ``NAME.refresh`` or ``NAME.block_step``.
    """
    turns: list[Turn] = []
    original = Decoder.turn

    def turn(decoder: Decoder) -> list[DecodingRow]:
        before = [row.nfe for row in decoder.rows]
        active = [row for row in decoder.rows if not row.done]
        fresh = any(row.fresh or row.config.cache == "none" for row in active)

        def call() -> list[DecodingRow]:
            if name is None:
                return original(decoder)
            with torch.profiler.record_function(f"{name}.{'refresh' if fresh else 'block_step'}"):
                return original(decoder)

        seconds, active = timed(call, device)
        steps = max(row.nfe - nfe for row, nfe in zip(decoder.rows, before, strict=True))
        turns.append(Turn(fresh, steps, seconds))
        return active

    Decoder.turn = turn  # type: ignore[method-assign]
    try:
        yield turns
    finally:
        Decoder.turn = original  # type: ignore[method-assign]


def step_seconds(turns: Sequence[Turn], refresh: bool) -> list[float]:
    """Seconds of each step of the turns that refresh, or of the others."""
    return [turn.seconds / turn.steps for turn in turns if turn.is_refresh == refresh]


# ---------------------------------------------------------------------------------------------------------
# Ceilings
# ---------------------------------------------------------------------------------------------------------


def bandwidth(device: str, repeats: int, size: int = 1 << 28) -> dict[str, Any]:
    """Bytes a second of a copy (read and written) and of a sum (read), and the larger: the ceiling."""
    a, b = torch.ones(2, size // 4, device=device)
    calls = {
        "copy": lambda: timed(lambda: a.copy_(b), device)[0],
        "read": lambda: timed(lambda: b.sum(), device)[0],
    }
    interleaved(calls, 2)
    samples = interleaved(calls, repeats)
    rates = {
        "copy": 2 * a.nbytes / statistics.median(samples["copy"]),
        "read": a.nbytes / statistics.median(samples["read"]),
    }
    return {"bytes_per_s": max(rates.values()), "by": rates, "samples_s": samples, "size_bytes": a.nbytes}


def matmul_ceiling(dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """FLOP a second of a square product that is large enough to be torch's best."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    call = {"matmul": lambda: timed(lambda: a @ b, device)[0]}
    interleaved(call, 2)
    samples = interleaved(call, repeats)["matmul"]
    return {"flop_per_s": 2 * size**3 / statistics.median(samples), "size": size, "samples_s": samples}


# ---------------------------------------------------------------------------------------------------------
# Command line and results
# ---------------------------------------------------------------------------------------------------------

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def parser_for(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the arguments that the benchmarks have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() and _C.cuda_built else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--shape", choices=SHAPES, help="of the model; default: small; on CUDA llada-8b")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="default: see the code; on CUDA bfloat16")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--quick", action="store_true", help="few cases, few repeats")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new case after so many")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape asked for, or the device's default."""
    return SHAPES[args.shape or ("llada-8b" if args.device == "cuda" else "small")]


def dtypes_of(args: argparse.Namespace, *default: str) -> list[str]:
    """The dtypes asked for, or those given; on CUDA bfloat16."""
    return args.dtype or (["bfloat16"] if args.device == "cuda" else list(default))


class Results:
    """A file of results, written anew with every row, so that a run that is cut short leaves what it has."""

    def __init__(self, args: argparse.Namespace, question: str, **conditions: Any) -> None:
        self.path: Path = args.out
        self.facts = machine_facts(args.device) | {"question": question, "conditions": conditions}
        self.rows: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.extra: dict[str, Any] = {}
        self._end = time.perf_counter() + args.seconds
        print(f"{question}\n{conditions_line(self.facts)}", flush=True)

    @property
    def is_late(self) -> bool:
        """The time for new cases is over; what is left out is noted by the caller."""
        return time.perf_counter() > self._end

    def add(self, *rows: dict[str, Any]) -> None:
        """Appends rows and writes the file."""
        self.rows += rows
        self.write()

    def miss(self, what: str, why: str) -> None:
        """Notes what could not be measured, and why."""
        self.missing[what] = why
        print(f"without {what}: {why}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes the file."""
        whole = {
            **self.facts,
            **self.extra,
            "load_after": os.getloadavg(),
            "missing": self.missing,
            "results": self.rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def machine_facts(device: str) -> dict[str, Any]:
    """When, what code, what machine, and how it was called."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("FASTDLLM_COMMIT", ""),
        "changed_files": _git("diff", "HEAD", "--name-only", "--", ".", ":!benchmarks/results").splitlines(),
        "command": command_line(sys.argv),
        "device": device,
        "driver": _driver() if device == "cuda" else "",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_before": os.getloadavg(),
        "environment": fd.collect_env(),
    }


def command_line(arguments: Sequence[str]) -> str:
    """The call without places of this machine: paths within the repository from there, others by name."""

    def shown(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        if path.is_relative_to(ROOT):
            return str(path.relative_to(ROOT))
        return path.name if path.suffix else "PATH"

    return shlex.join(["python", *map(shown, arguments)])


def conditions_line(facts: dict[str, Any]) -> str:
    """Machine, versions and threads in a line."""
    found = facts["environment"]
    if facts.get("device") == "cuda" or found["cuda_available"]:
        machine = f"{', '.join(found['gpus']) or 'CUDA'}, driver {facts.get('driver') or 'unknown'}"
    else:
        machine = f"{found['cpu']} ({found['cpu_isa']}), {found['threads']} threads"
    commit = facts["commit"][:10] or "unknown"
    changed = " with changes" if facts["changed_files"] else ""
    return (
        f"{machine}; torch {found['torch']}, transformers {found['transformers']}, Python {found['python']}; "
        f"commit {commit}{changed}; {facts['date'][:10]}"
    )


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]
        )
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return found.stdout.strip()
