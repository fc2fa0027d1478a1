"""What `report` and `calibrate` are told on the command line, opened: a model, a task, and conditions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm_ext.checks import check_count
from fastdllm_ext.commands.opening import DEMO, add_model_arguments, open_model
from fastdllm_ext.env import collect_env
from fastdllm_ext.eval.tasks import Task, open_task
from fastdllm_ext.forward import device_of
from fastdllm_ext.patching.registry import CHOICES, patched_family

Setting = dict[str, Any]  # fields of a GenerationConfig that differ from its defaults


def add_run_arguments(parser: argparse.ArgumentParser, limit: int) -> None:
    """The options that both commands have. ``limit``: problems by default."""
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task", help="'demo', a file PROMPTS.jsonl, or a task of lm-eval (demo, for that model)"
    )
    task.add_argument("--limit", type=int, default=limit, help=f"problems at most ({limit})")
    task.add_argument("--seed", type=int, default=0, help="of the choice of problems and examples (0)")
    task.add_argument("--chat", action="store_true", help="ask through the tokenizer's chat template")
    task.add_argument("--metric", help="of an lm-eval task, as it names them: exact_match,flexible-extract")
    task.add_argument("--include-path", help="folder of further lm-eval tasks")
    task.add_argument(
        "--confirm-run-unsafe-code", action="store_true",
        help="the task may run code that the model wrote, on this machine",
    )  # fmt: skip
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--gen-length", type=int, help="tokens to generate (128 for demo, else 256)")
    decoding.add_argument("--block-length", type=int, default=32, help="tokens of a block (32)")
    decoding.add_argument("--batch-size", type=int, default=1, help="problems decoded together (1)")
    add_model_arguments(parser)


@dataclass(frozen=True)
class Run:
    """A model, a task, and all that its results depend on.

    Attributes:
        model, tokenizer: loaded and patched.
        task: the problems.
        gen_length, block_length: of decoding.
        conditions: what results of one run have in common; plain values that JSON can hold.
        open_task: the same task with another number of examples before each prompt.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    gen_length: int
    block_length: int
    conditions: dict[str, Any]
    open_task: Callable[[int | None], Task]

    def fits(self, setting: Setting) -> bool:
        """Whether the longest prompt and its answer are within the model's positions."""
        positions = patched_family(self.model).geometry(self.model).max_positions
        return max(map(len, self.prompts())) + int(setting["gen_length"]) <= positions

    def check_fits(self, setting: Setting) -> None:
        """ValueError unless the setting fits."""
        if not self.fits(setting):
            raise ValueError(
                f"gen_length={setting['gen_length']}: with a prompt of "
                f"{max(map(len, self.prompts()))} tokens it exceeds the model's positions"
            )

    @property
    def batch_size(self) -> int:
        """Problems decoded together."""
        return int(self.conditions["batch_size"])

    def prompts(self) -> list[Tensor]:
        """Each problem's prompt, 1-D int64 on the model's device."""
        device = device_of(patched_family(self.model).parts(self.model).embedding)
        return [
            torch.tensor(self.tokenizer(problem.prompt)["input_ids"], device=device)
            for problem in self.task.problems
        ]

    def with_shots(self, shots: int) -> Run:
        """The same with another number of examples before each prompt."""
        return replace(self, task=self.open_task(shots), conditions=self.conditions | {"shots": shots})


def open_run(arguments: argparse.Namespace, shots: int | None = None, problems: int | None = None) -> Run:
    """Loads the model and opens the task, with ``problems`` in place of the arguments' ``limit``.

    Raises:
        ValueError, TypeError, OSError, ImportError: as :func:`open_model` and :func:`open_task`; a tokenizer
            without a chat template where one is asked for.
    """
    demo = arguments.model == DEMO
    if arguments.task is None and not demo:
        raise ValueError("--task is missing; takes 'demo', a file PROMPTS.jsonl, or a task of lm-eval")
    gen_length = arguments.gen_length or (128 if demo else 256)
    for name in ("gen_length", "block_length", "batch_size", "limit"):
        check_count(name, gen_length if name == "gen_length" else getattr(arguments, name))
    model, tokenizer = open_model(arguments)

    def chat(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    if arguments.chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"--chat: the tokenizer of {arguments.model} has no chat template")

    def task(examples: int | None) -> Task:
        return open_task(
            arguments.task or "demo",
            arguments.limit if problems is None else problems,
            seed=arguments.seed,
            shots=examples,
            chat=chat if arguments.chat else None,
            metric=arguments.metric,
            include_path=arguments.include_path,
            run_unsafe_code=arguments.confirm_run_unsafe_code,
        )

    opened = task(shots)
    weight = next(model.parameters())
    environment = collect_env()
    conditions = {
        "model": str(arguments.model),
        "model_name": "demo model" if demo else Path(arguments.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "options": {name: getattr(arguments, name) for name in CHOICES},
        "task": opened.name,
        "metric": opened.metric,
        "problems": len(opened.problems),
        "seed": arguments.seed,
        "shots": shots,
        "chat": arguments.chat,
        "batch_size": arguments.batch_size,
        "gen_length": gen_length,
        "block_length": arguments.block_length,
        "machine": _machine(environment, weight.device),
        "environment": environment,
    }
    return Run(model, tokenizer, opened, gen_length, arguments.block_length, conditions, task)


def _machine(environment: dict[str, Any], device: torch.device) -> str:
    if device.type == "cuda":
        return str(environment["gpus"][device.index or 0])
    return f"{environment['cpu']}, threads: {environment['threads']}"
