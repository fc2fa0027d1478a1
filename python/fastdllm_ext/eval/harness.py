"""The backend `fastdllm` of lm-evaluation-harness (lm_eval 0.4): docs/evaluation.md."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

import fastdllm_ext as fd
from fastdllm_ext.checks import check_count
from fastdllm_ext.commands.opening import load_remote
from fastdllm_ext.eval import NEEDS
from fastdllm_ext.eval.harness_arguments import (
    as_dtype,
    as_rows,
    checked,
    join_processes,
    parsed,
)
from fastdllm_ext.eval.throughput import Answer, Throughput, summary
from fastdllm_ext.forward import device_of
from fastdllm_ext.generate import defaults_of
from fastdllm_ext.patching.registry import patched_family, patched_options, unwrapped

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(NEEDS) from error

__all__ = ["FastDLLM", "latest_throughput"]

logger = logging.getLogger(__name__)
clock = time.perf_counter

# lm_eval's length where neither the user nor the task names one.
DEFAULT_GEN_LENGTH = 256
# Names under which tasks give a length, the first one counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_p", "top_k")
FIELDS = tuple(f.name for f in dataclasses.fields(fd.GenerationConfig))
# In lm_eval's cache of answers: the settings that gave them.
SETTINGS_KEY = "fastdllm settings"
FREE_SHARE = 0.9  # of a GPU's free memory that batch_size="auto" takes; the rest is for fragmentation

_latest: list[Throughput] = []


def latest_throughput() -> dict[str, Any]:
    """The figures of the backend that was made last, as its results hold them.

    Empty where it generated nothing, and in all but the first of several processes.
    """
    return summary(_latest)


@dataclass(frozen=True)
class _Job:
    """A request to generate: where its answer goes, and what is asked."""

    index: int
    request: Any
    prompt: list[int]
    seed: int


class FastDLLM(TemplateLM):  # type: ignore[misc]
    """Evaluates a LLaDA or Dream model through :func:`fastdllm_ext.generate` and ``loglikelihood``.

    Args:
        pretrained: a folder or a name on the Hub, or a model that is loaded already.
        tokenizer: a folder, a name or a tokenizer; by default the checkpoint's.
        dtype: of the weights, such as "bfloat16"; "auto" is the checkpoint's.
        device: "cpu", "cuda", "cuda:1"; by default the first GPU where there is one. Under accelerate each
            process takes its own.
        device_map: in place of ``device``, as :func:`fastdllm_ext.load` takes it.
        batch_size: rows of a generation; "auto" takes as many as fit into the GPU's free memory.
        max_batch_size: the most that "auto" takes.
        trust_remote_code: runs the modeling code that the checkpoint brings along, in place of our classes.
        runtime, quantization, kv_cache_dtype: :func:`fastdllm_ext.patch`'s options.
        add_bos_token: True puts the tokenizer's BOS before every prompt that does not begin with it, False
            never does, None leaves it to the tokenizer.
        max_length: positions of prompt and answer together; by default the model's.
        generation_config: a folder with a generation_config.json that
            :meth:`fastdllm_ext.GenerationConfig.save_pretrained` wrote; other arguments are laid over it.
        mc_samples: draws of a likelihood. An answer of one token takes one, which is exact.
        mc_batch_size: rows of a likelihood's forward; likelihoods depend on it, but not on ``batch_size``.
        is_greedy: whether likelihood requests also find out if greedy decoding, one token a step, would give
            the continuation: as many forwards as it has tokens. False answers "no" to all.
        **arguments: the fields of :class:`fastdllm_ext.GenerationConfig`, as values or as text.

    Raises:
        TypeError: unknown arguments, all of which the message names; one of the wrong type.
        ValueError: one that is out of range.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str = "auto",
        device: str | None = None,
        device_map: Any = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        trust_remote_code: bool = False,
        runtime: Any = None,
        quantization: Any = None,
        kv_cache_dtype: Any = None,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
        generation_config: str | os.PathLike[str] | None = None,
        mc_samples: int = 128,
        mc_batch_size: int = 16,
        is_greedy: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(arguments)
        for name, count in (("mc_samples", mc_samples), ("mc_batch_size", mc_batch_size)):
            check_count(name, count)
        for name, flag in (("is_greedy", is_greedy), ("trust_remote_code", trust_remote_code)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}={flag!r}; takes True or False")
        if add_bos_token not in (None, True, False):
            raise TypeError(f"add_bos_token={add_bos_token!r}; takes True, False or None")
        self.batch_size = as_rows(batch_size)
        self.max_batch_size = 64 if max_batch_size is None else max_batch_size
        check_count("max_batch_size", self.max_batch_size)
        self.add_bos_token = add_bos_token
        self.mc_samples, self.mc_batch_size, self.is_greedy = mc_samples, mc_batch_size, is_greedy
        values = {name: parsed(value) for name, value in arguments.items()}
        saved = None if generation_config is None else fd.GenerationConfig.from_pretrained(generation_config)
        self.asked = set(FIELDS) if saved is not None else set(values)
        if "max_new_tokens" in values:
            self.asked.add("gen_length")

        self.accelerator = join_processes(device)
        if self.accelerator is not None:
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if isinstance(pretrained, nn.Module):
            if (dtype, device_map, trust_remote_code) != ("auto", None, False):
                raise ValueError(
                    f"dtype={dtype!r}, device_map={device_map!r}, trust_remote_code={trust_remote_code}: "
                    "are a matter of loading; a model that is loaded already takes none of them"
                )
            self.model, own = fd.patch(pretrained), None
        else:
            place = {"device": self._place(device)} if device_map is None else {"device_map": device_map}
            load = load_remote if trust_remote_code else fd.load
            self.model, own = load(pretrained, dtype=as_dtype(dtype), **place)
        fd.patch(self.model, runtime=runtime, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        self.tokenizer: Any = own if tokenizer is None else tokenizer
        if self.tokenizer is None:
            raise ValueError("tokenizer=None: the model comes with none; takes a tokenizer, or its folder")
        if add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("add_bos_token=True: the tokenizer has no BOS token; takes False or None")

        inner = unwrapped(self.model)
        self.family = patched_family(inner)
        geometry = self.family.geometry(inner)
        self._device = device_of(self.family.parts(inner).embedding)
        self.max_length = geometry.max_positions if max_length is None else max_length
        check_count("max_length", self.max_length, least=2)
        if self.max_length > geometry.max_positions:
            raise ValueError(f"max_length={max_length}; takes at most the model's {geometry.max_positions}")
        base = defaults_of(inner) if saved is None else saved
        if saved is None and "gen_length" not in base.to_dict():
            base = dataclasses.replace(base, gen_length=DEFAULT_GEN_LENGTH)
        self.config = checked(fd.GenerationConfig.build(base, values))
        self.eot_ids = geometry.eos_ids
        self.special_tokens = {
            str(token): number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.throughput = Throughput()
        self.processes = [self.throughput]
        self._warned: set[str] = set()
        self.settings_of: dict[str, fd.GenerationConfig] = {}
        global _latest
        _latest = self.processes if self.rank == 0 else []

    # --- What lm_eval asks about the model ---------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(
            self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.eot_ids[0]
        )

    @property
    def prefix_token_id(self) -> int:
        """What stands in the place of an empty prompt: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm_eval's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that is applied; None where lm_eval asks for none.

        Raises:
            ValueError: the tokenizer has none, or none of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        if not self.tokenizer.chat_template:
            raise ValueError("apply_chat_template: the tokenizer has no chat template; takes False")
        return super().chat_template(chat_template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as a prompt; the last one goes on where no generation prompt is added."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS as ``add_bos_token`` says; a text that begins with BOS gets no second one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        if add_special_tokens is not None or self.add_bos_token is None:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(self.tokenizer(string, **special)["input_ids"])
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        return [self.tokenizer.bos_token_id, *ids] if self.add_bos_token else ids

    def get_model_info(self) -> dict[str, Any]:
        """For the results' "config": the model, how it decodes, where, and how fast it was."""
        inner: Any = unwrapped(self.model)
        return {
            "model_num_parameters": sum(p.numel() for p in inner.parameters()),
            "model_dtype": str(next(inner.parameters()).dtype),
            "fastdllm": {
                "generation": dataclasses.asdict(self.config),
                "generation_of_tasks": {
                    task: {n: getattr(c, n) for n in FIELDS if getattr(c, n) != getattr(self.config, n)}
                    for task, c in self.settings_of.items()
                },
                "max_length": self.max_length,
                "likelihood": {"mc_samples": self.mc_samples, "mc_batch_size": self.mc_batch_size},
                "options": dataclasses.asdict(patched_options(inner)),
                "device": str(self.device),
                "processes": self.world_size,
                "throughput": summary(self.processes),
                "environment": fd.collect_env(),
            },
        }

    # --- Several processes -------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A tensor of every process, behind one another."""
        if self.accelerator is None:
            return tensor
        found: Tensor = self.accelerator.gather(tensor.to(self.accelerator.device))
        return found

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """An object of every process, on ``dst``; None on the others. Their figures come along."""
        if self.accelerator is None:
            return [obj]
        here = self.rank == dst
        pairs: list[Any] | None = [None] * self.world_size if here else None
        torch.distributed.gather_object((obj, self.throughput), pairs, dst=dst)
        if pairs is None:
            return None
        self.processes[:] = [throughput for _, throughput in pairs]
        return [found for found, _ in pairs]

    def barrier(self) -> None:
        """Waits for every process."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _place(self, device: str | None) -> str:
        """The device to load to. lm_eval's command line says cuda:0 by itself, GPU or not."""
        if self.accelerator is not None:
            return str(self.accelerator.device)
        if device is None:
            return "auto"
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            logger.warning("device=%s: there is no CUDA device; goes on with cpu", device)
            return "cpu"
        return str(device)

    # --- lm_eval's cache of answers ----------------------------------------------------------------

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Takes lm_eval's cache, whose keys know prompts but not settings: these are kept beside them.

        Raises:
            ValueError: the cache's answers come from other settings, or another backend.
        """
        super().set_cache_hook(cache_hook)
        answers = cache_hook.dbdict
        if answers is None:
            return
        mine = json.loads(json.dumps(self._identity(), default=str))
        theirs = answers.get(SETTINGS_KEY)
        if theirs is None:
            if len(answers):
                raise ValueError("use_cache: the file holds answers of another backend; takes a new one")
            answers[SETTINGS_KEY] = mine
            answers.commit()
        elif theirs != mine:
            names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
            was = ", ".join(f"{name}={theirs.get(name)!r}" for name in names)
            now = ", ".join(f"{name}={mine.get(name)!r}" for name in names)
            raise ValueError(f"use_cache: the file holds answers with {was}; takes a new one for {now}")

    def _identity(self) -> dict[str, Any]:
        """All that an answer depends on, the prompt apart. Rows do not depend on their batch."""
        inner: Any = unwrapped(self.model)
        return {
            "pretrained": str(inner.config._name_or_path),
            "tokenizer": str(self.tokenizer.name_or_path),
            "dtype": str(next(inner.parameters()).dtype),
            "add_bos_token": self.add_bos_token,
            "max_length": self.max_length,
            "mc_samples": self.mc_samples,
            "mc_batch_size": self.mc_batch_size,
            "is_greedy": self.is_greedy,
            **dataclasses.asdict(patched_options(inner)),
            **dataclasses.asdict(self.config),
        }

    def _keep(self, kind: str, found: Sequence[tuple[Any, Any]]) -> None:
        """Writes a batch's answers to lm_eval's cache, and out of this process."""
        for arguments, answer in found:
            self.cache_hook.add_partial(kind, arguments, answer)
        if self.cache_hook.dbdict is not None:
            self.cache_hook.dbdict.commit()

    # --- Generation --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, cut at the first of its stop strings, in the order of the requests."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        copies: list[tuple[int, int]] = []
        seen: Counter[int] = Counter()
        first: dict[int, int] = {}
        for index, request in enumerate(requests):
            number = seen[id(request)]
            seen[id(request)] += 1
            first.setdefault(id(request), index)
            if number >= (request.repeats or 1):  # lm_eval evens out its processes with copies
                copies.append((index, first[id(request)]))
                continue
            key = (str(request.task_name), json.dumps(request.args[1], sort_keys=True, default=repr))
            groups.setdefault(key, []).append((index, number))
        total = len(requests) - len(copies)
        with tqdm(
            total=total, desc="generating", unit="request", disable=disable_tqdm or self.rank != 0
        ) as bar:
            for (task, _), members in groups.items():  # a batch is of one task: its seconds are that task's
                kwargs = requests[members[0][0]].args[1]
                config, stops = self._settings(kwargs)
                self.settings_of[task] = config
                jobs = self._jobs(requests, members, config)
                for batch in self._batches(jobs, config):
                    texts = self._answer(task, batch, config, stops)
                    for job, text in zip(batch, texts, strict=True):
                        answers[job.index] = text
                    sampled = config.temperature > 0
                    self._keep(
                        "generate_until",
                        [
                            (job.request.args, text)
                            for job, text in zip(batch, texts, strict=True)
                            if not (sampled and (job.request.repeats or 1) > 1)  # one key for all of them
                        ],
                    )
                    bar.update(len(batch))
        for index, source in copies:
            answers[index] = answers[source]
        return answers

    def _settings(self, kwargs: Mapping[str, Any]) -> tuple[fd.GenerationConfig, list[str]]:
        """How to decode a task's requests, and where their answers stop.

        A task's length and sampling count where the user's arguments say nothing of it. Names of our own
        in ``gen_kwargs`` can only be the user's, and count before all.
        """
        kwargs = dict(kwargs)
        stops = kwargs.pop("until", None) or []
        stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        values: dict[str, Any] = {}
        lengths = [kwargs.pop(name) for name in LENGTHS if kwargs.get(name) is not None]
        if lengths and "gen_length" not in self.asked:
            values["gen_length"] = int(lengths[0])
        do_sample, theirs = kwargs.pop("do_sample", None), {n: kwargs.pop(n, None) for n in SAMPLING}
        if not self.asked & set(SAMPLING):
            values |= self._sampling(do_sample, theirs)
        for name in [name for name in kwargs if name in FIELDS]:
            values[name] = parsed(kwargs.pop(name))
        for name, value in kwargs.items():
            if value is not None and name not in LENGTHS:
                self._warn_once(f"gen_kwargs: {name}={value!r} means nothing to a diffusion model; ignored")
        config = checked(fd.GenerationConfig.build(self.config, values))
        if self._length(config) >= self.max_length:
            raise ValueError(
                f"gen_length={config.gen_length}: leaves no room for a prompt within max_length, "
                f"{self.max_length}; takes at most {self.max_length - 1}"
            )
        return config, stops

    def _sampling(self, do_sample: Any, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """A task's sampling, as HuggingFace means it: without do_sample, a temperature decides."""
        temperature = theirs["temperature"]
        if do_sample is None and temperature is None:
            return {}
        if not (do_sample or (do_sample is None and temperature)):
            return {"temperature": 0.0}
        values = {"temperature": 1.0 if temperature is None else float(temperature)}
        for name in ("top_p", "top_k"):
            if theirs[name] is None:
                continue
            if self.family.samples_first:
                values[name] = theirs[name]
            else:
                self._warn_once(f"gen_kwargs: {self.family.model_type} has no {name}; ignored")
        return values

    def _jobs(
        self, requests: Sequence[Any], members: Sequence[tuple[int, int]], config: fd.GenerationConfig
    ) -> list[_Job]:
        """Requests as prompts of tokens, cut on the left to what fits, the longest first."""
        room = self.max_length - self._length(config)
        jobs, long = [], 0
        for index, number in members:
            prompt = self.tok_encode(requests[index].args[0]) or [self.prefix_token_id]
            long += len(prompt) > room
            prompt = prompt[-room:]
            jobs.append(_Job(index, requests[index], prompt, request_seed(config.seed, prompt, number)))
        if long:
            logger.warning(
                "%d of %d prompts are longer than the %d tokens that gen_length=%d leaves of %d; "
                "their beginnings are cut off",
                long, len(jobs), room, self._length(config), self.max_length,
            )  # fmt: skip
        return sorted(jobs, key=lambda job: -len(job.prompt))

    def _batches(self, jobs: Sequence[_Job], config: fd.GenerationConfig) -> Iterator[list[_Job]]:
        """Runs of jobs, as many as ``batch_size`` says."""
        rest = list(jobs)
        while rest:
            count = self.batch_size if isinstance(self.batch_size, int) else self._fitting(rest, config)
            yield rest[:count]
            rest = rest[count:]

    def _fitting(self, jobs: Sequence[_Job], config: fd.GenerationConfig) -> int:
        """How many of the jobs fit into the GPU's free memory, one at least; on a CPU, ``max_batch_size``."""
        most = min(self.max_batch_size, len(jobs))
        if self.device.type != "cuda":
            return most
        torch.cuda.empty_cache()
        free = FREE_SHARE * torch.cuda.mem_get_info(self.device)[0]
        lengths = [len(job.prompt) + self._length(config) for job in jobs[:most]]
        while most > 1 and fd.memory_needed(self.model, lengths[:most], config)["total"] > free:
            most = most * 3 // 4
        return most

    def _answer(
        self, task: str, batch: Sequence[_Job], config: fd.GenerationConfig, stops: Sequence[str]
    ) -> list[str]:
        """Generates a batch, and takes down what it cost."""
        config = dataclasses.replace(config, seed=[job.seed for job in batch])
        prompts = [torch.tensor(job.prompt, device=self.device) for job in batch]
        self._synchronize()
        begin = clock()
        output = fd.generate(self.model, prompts, config=config)
        self._synchronize()
        seconds = clock() - begin
        texts = [self._text(answer.tolist(), stops) for answer in output.answers()]
        costs = [
            Answer(
                task, len(answer), len(self.tokenizer(text, add_special_tokens=False)["input_ids"]), int(nfe)
            )
            for answer, text, nfe in zip(output.answers(), texts, output.nfe, strict=True)
        ]
        self.throughput.add(task, seconds, costs)
        return texts

    def _text(self, tokens: list[int], stops: Sequence[str]) -> str:
        """An answer's text without special tokens, up to its first stop: a string, or a special token."""
        marks = {self.special_tokens[stop] for stop in stops if stop in self.special_tokens}
        tokens = list(itertools.takewhile(lambda token: token not in marks, tokens))
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return text[: min((at for at in map(text.find, stops) if at >= 0), default=None)]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @staticmethod
    def _length(config: fd.GenerationConfig) -> int:
        assert isinstance(config.gen_length, int)  # by checked
        return config.gen_length

    # --- Likelihood --------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy decoding gives it) of each ((texts), prompt, continuation)."""
        return self._likelihoods(requests, disable_tqdm, self.is_greedy, "loglikelihood")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows that do not overlap, each after what is left of the context."""
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm or self.rank != 0):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._likelihoods(pairs, True, False, None)))
            self._keep("loglikelihood_rolling", [(request.args, found[-1])])
        return found

    def _likelihoods(
        self, requests: Sequence[Any], disable_tqdm: bool, greedy: bool, kind: str | None
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs, long = [], 0
        for index, (_, prompt, answer) in enumerate(requests):
            long += len(prompt) + len(answer) > self.max_length
            answer = answer[-(self.max_length - 1) :]
            pairs.append((index, prompt[-(self.max_length - len(answer)) :], answer))
        if long:
            logger.warning(
                "%d of %d requests are longer than max_length, %d; their beginnings are cut off",
                long, len(requests), self.max_length,
            )  # fmt: skip
        if not greedy and kind is not None:
            self._warn_once("is_greedy=False: every likelihood request is told that greedy decoding differs")
        pairs.sort(key=lambda pair: (len(pair[2]) == 1, -len(pair[1]) - len(pair[2])))
        bar = tqdm(
            total=len(pairs), desc="likelihoods", unit="request", disable=disable_tqdm or self.rank != 0
        )
        with bar:
            for one_token, run in itertools.groupby(pairs, key=lambda pair: len(pair[2]) == 1):
                samples = 1 if one_token else self.mc_samples
                while batch := list(itertools.islice(run, self._pairs_at_once(samples))):
                    self._score(batch, found, samples, greedy)
                    if kind is not None:
                        self._keep(kind, [(requests[index][0], found[index]) for index, _, _ in batch])
                    bar.update(len(batch))
        return found

    def _pairs_at_once(self, samples: int) -> int:
        """Enough to fill a forward, and no more, for a batch is what an interruption may lose."""
        rows = self.batch_size if isinstance(self.batch_size, int) else 1
        return max(rows, -(-self.mc_batch_size // samples))

    def _score(
        self, batch: Sequence[Any], found: list[tuple[float, bool]], samples: int, greedy: bool
    ) -> None:
        prompts, answers = (
            [torch.tensor(pair[i], dtype=torch.int64, device=self.device) for pair in batch] for i in (1, 2)
        )
        values = fd.loglikelihood(
            self.model,
            prompts,
            answers,
            samples=samples,
            batch_size=self.mc_batch_size,
            cfg_scale=self.config.cfg_scale,
            seed=[_seed(self.config.seed)] * len(batch),
        ).tolist()
        same = self._decoded(prompts, answers) if greedy else [False] * len(batch)
        for (index, _, _), value, flag in zip(batch, values, same, strict=True):
            found[index] = (value, flag)

    def _decoded(self, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> list[bool]:
        """Whether each answer is what comes out of as many masks, of which every forward fills the surest."""
        lengths = [len(answer) for answer in answers]
        output = fd.generate(
            self.model,
            list(prompts),
            config=fd.GenerationConfig(
                gen_length=lengths,
                block_length=max(lengths),
                steps=max(lengths),
                cache="none",
                stop_on_eos=False,
                cfg_scale=self.config.cfg_scale,
            ),
        )
        begins = output.prompt_lengths.tolist()
        return [
            bool(torch.equal(row[begin : begin + len(answer)], answer))
            for row, begin, answer in zip(output.sequences, begins, answers, strict=True)
        ]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def request_seed(seed: int | Sequence[int] | None, prompt: Sequence[int], number: int) -> int:
    """The seed of a request's row: the same in any batch, and after an interruption.

    Args:
        seed: the user's; None is 0.
        prompt: its tokens.
        number: which of the answers to this prompt, where the task asks for several.
    """
    text = f"{_seed(seed)} {number} {list(prompt)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _seed(seed: int | Sequence[int] | None) -> int:
    return seed if isinstance(seed, int) else 0


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """TypeError that names all that is neither a field of GenerationConfig nor one of ours."""
    unknown = sorted(set(arguments) - {*FIELDS, "max_new_tokens"})
    if unknown:
        own = [name for name in inspect.signature(FastDLLM).parameters if name != "arguments"]
        raise TypeError(
            f"fastdllm: unknown model arguments {', '.join(map(repr, unknown))}; takes "
            f"{', '.join([*own, *FIELDS])}"
        )
