"""lm_eval's backend against `fd.generate` and `fd.loglikelihood`, on tasks made of the demo's prompts."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import pytest
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

import fastdllm_ext as fd
from fastdllm_ext.demo_tasks import Problem, held_out
from fastdllm_ext.eval import FastDLLM, harness
from fastdllm_ext.eval.command import lm_eval_arguments, merged, read_settings, run, settings_names
from fastdllm_ext.eval.harness import request_seed
from fastdllm_ext.patching.registry import patched_options
from tiny import tiny_dream

PROBLEMS = held_out(11, seed=3)  # an odd number, for two processes and for batches
STOP = "Sum"  # in every addition's answer
SETTINGS: dict[str, Any] = {"gen_length": 128, "threshold": 0.9}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}Sort {% endif %}"
    "{{ message['content'] }}{% if not loop.last %} and {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}.{% endif %}"
)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return fd.load(fd.demo_model_path(), device="cpu")


@pytest.fixture(autouse=True)
def lm_eval_logs_to_us() -> Iterator[None]:
    """lm_eval's command line sets up logging for the process."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def backend(demo: tuple[Any, Any]) -> Callable[..., Any]:
    def make(**arguments: Any) -> Any:
        model, tokenizer = demo
        return FastDLLM(pretrained=model, **{"tokenizer": tokenizer, **SETTINGS, **arguments})

    return make


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks: the whole answer, and the answer up to a stop string."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [json.dumps({"question": p.prompt, "answer": p.answer}) for p in PROBLEMS]
    (folder / "data.json").write_text("\n".join(lines), encoding="utf-8")
    for name, until, target in (("whole", [], "{{answer}}"), ("cut", [STOP, "\n7"], "nothing")):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "data.json")},
                "cache_dir": str(tmp_path / "datasets"),
            },
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": target,
            "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": 64},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # which is YAML as well
    return folder


def evaluate(tasks: Path, model: Any, names: tuple[str, ...] = ("whole",), **arguments: Any) -> Any:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **arguments
    )


def ask(prompt: str, number: int = 0, repeats: int = 1, task: str = "task", **kwargs: Any) -> Instance:
    return Instance("generate_until", {}, (prompt, kwargs), number, (task, number, repeats))


def pair(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, ("task", 0, 1))


def tokens_of(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)


def alone(demo: tuple[Any, Any], problem: Problem, **settings: Any) -> tuple[str, int, int]:
    """One prompt through fd.generate: (text, tokens up to and including EOS, forwards)."""
    model, tokenizer = demo
    output = fd.generate(model, [tokens_of(tokenizer, problem.prompt)], **{**SETTINGS, **settings})
    row = output.sequences[0, len(tokenizer(problem.prompt)["input_ids"]) :].tolist()
    eos = model.config.eos_token_id
    length = row.index(eos) + 1 if eos in row else len(row)
    return tokenizer.decode(row[:length], skip_special_tokens=True), length, int(output.nfe[0])


# --- Generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_answers_and_speed_are_those_of_generate(
    monkeypatch: pytest.MonkeyPatch, demo: tuple[Any, Any], tasks: Path, batch_size: int
) -> None:
    """Through lm_eval's registry, both tasks in one run; each generating call takes a second by our clock."""
    ticks = iter(range(1000))
    monkeypatch.setattr(harness, "clock", lambda: float(next(ticks)))
    arguments = {"pretrained": str(fd.demo_model_path()), "gen_length": "128", "threshold": "0.9"}
    results = evaluate(
        tasks, "fastdllm", ("whole", "cut"), model_args=arguments, batch_size=batch_size, device="cpu"
    )
    wanted = [alone(demo, problem) for problem in PROBLEMS]
    cut = [re.split(f"{STOP}|\n7", text)[0] for text, _, _ in wanted]
    assert any(text != whole for text, (whole, _, _) in zip(cut, wanted, strict=True))
    for task, texts in (("whole", [text for text, _, _ in wanted]), ("cut", cut)):
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        assert [sample["resps"] for sample in samples] == [[[text]] for text in texts]
    right = [text == problem.answer for problem, (text, _, _) in zip(PROBLEMS, wanted, strict=True)]
    assert sum(right) > 0
    assert results["results"]["whole"]["exact_match,none"] == sum(right) / len(PROBLEMS)

    info = results["config"]["fastdllm"]
    batches = -(-len(PROBLEMS) // batch_size)
    for task, texts in (("whole", [text for text, _, _ in wanted]), ("cut", cut)):
        lengths, forwards = [n for _, n, _ in wanted], [nfe for _, _, nfe in wanted]
        shorter = sum(len(demo[1](text)["input_ids"]) for text in texts)
        assert info["throughput"]["tasks"][task] == pytest.approx(
            {
                "requests": len(PROBLEMS),
                "tokens": sum(lengths),
                "tokens_after_stops": shorter,
                "seconds": batches,
                "tokens_per_second": sum(lengths) / batches,
                "tokens_per_second_after_stops": shorter / batches,
                "nfe": sum(forwards) / len(PROBLEMS),
                "tokens_per_forward": sum(n / f for n, f in zip(lengths, forwards, strict=True))
                / len(PROBLEMS),
            }
        )
    both = info["throughput"]["all"]
    assert (both["requests"], both["seconds"]) == (2 * len(PROBLEMS), 2 * batches)
    assert both["tokens_per_second"] == pytest.approx(
        info["throughput"]["tasks"]["whole"]["tokens_per_second"]
    )
    assert info["generation"]["gen_length"] == 128
    assert info["environment"]["torch"] == torch.__version__
    json.dumps(results["config"])


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path, tmp_path: Path
) -> None:
    """Settings from a file, under what the arguments say; figures below lm_eval's table, and in its JSON."""
    small = TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: small(**kwargs, include_defaults=False))
    settings = tmp_path / "mine.yaml"
    settings.write_text(
        f"model_args: {{pretrained: {fd.demo_model_path()}, gen_length: 128, steps: 16}}\n"
        f"tasks: [cut]\ninclude_path: {tasks}\nbatch_size: 3\n",
        encoding="utf-8",
    )
    before = sys.argv
    argv = ["--settings", str(settings), "--tasks", "whole", "--model_args", "threshold=0.9,cache=prefix"]
    assert run([*argv, "--output_path", str(tmp_path / "out"), "--limit", "5"]) == 0
    assert sys.argv is before
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    generation = config["fastdllm"]["generation"]
    assert (generation["steps"], generation["threshold"], generation["cache"]) == (None, 0.9, "prefix")
    assert config["batch_size"] == "3"
    figures = config["fastdllm"]["throughput"]["tasks"]
    assert list(figures) == ["whole"]
    assert printed.index("|whole|") < printed.index("tokens/forward")
    (line,) = (line.split() for line in printed.splitlines() if line.startswith("whole "))
    found = figures["whole"]
    assert line[:3] == ["whole", "5", str(found["tokens"])]
    assert line[4] == f"{found['tokens_per_second']:.1f}"
    assert line[-2:] == [f"{found['nfe']:.1f}", f"{found['tokens_per_forward']:.2f}"]


def test_help_is_ours_and_lm_evals(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["ls", "--help"]):
        with pytest.raises(SystemExit) as stop:
            run(argv)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert "lm-eval" in printed
        assert ("--settings NAME" in printed) is (argv != ["ls", "--help"])


def test_stops(backend: Callable[..., Any], demo: tuple[Any, Any]) -> None:
    """The first place of any stop counts; a special token is one, though no text shows it."""
    text, length, nfe = alone(demo, PROBLEMS[0])
    lm = backend(batch_size=8)
    untils: list[Any] = [[], None, "Sum", ["Sum", "+"], ["+", "Sum"], ["<|mask|>", ""], ["\n", "=1"]]
    found = lm.generate_until([ask(PROBLEMS[0].prompt, i, until=u) for i, u in enumerate(untils)])
    begins = {stop: text.index(stop) for stop in ("Sum", "+", "\n", "=1") if stop in text}
    ends = [None, None, begins["Sum"], begins["+"], begins["+"], None, min(begins["\n"], begins["=1"])]
    assert found == [text[:end] for end in ends]
    eos = demo[0].config.eos_token_id
    tokens = [*demo[1]("Sum: 4")["input_ids"], eos, *demo[1]("55")["input_ids"]]
    assert lm._text(tokens, []) == "Sum: 455"
    assert lm._text(tokens, ["<|endoftext|>"]) == "Sum: 4"
    assert lm.throughput.answers[2].tokens == length
    assert {answer.nfe for answer in lm.throughput.answers} == {nfe}


@pytest.mark.parametrize(
    "model_args, kwargs, wanted",
    [
        # Length: the user's, else the task's, else lm_eval's.
        ({}, {}, {"gen_length": 256}),
        ({}, {"max_gen_toks": 40}, {"gen_length": 40}),
        ({}, {"max_tokens": 41.0, "max_new_tokens": 42}, {"gen_length": 42}),
        ({"gen_length": 32}, {"max_gen_toks": 40}, {"gen_length": 32}),
        ({"max_new_tokens": "33"}, {"max_gen_toks": 40}, {"gen_length": 33}),
        # Sampling: the same.
        ({}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({}, {"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({}, {"do_sample": True}, {"temperature": 1.0}),
        ({}, {"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.3}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.3}),
        # Our own names in gen_kwargs count before all, and a rule takes another one's place.
        ({"gen_length": 32}, {"gen_length": 48, "threshold": 0.5}, {"gen_length": 48, "threshold": 0.5}),
        ({"threshold": 0.8}, {"steps": "7"}, {"threshold": None, "steps": 7}),
        # Values as text.
        ({"window": "(2, 3)", "stop_on_eos": "false", "eos_token_id": "[1, 4]", "factor": "1e-1"}, {},
         {"window": (2, 3), "stop_on_eos": False, "eos_token_id": [1, 4], "factor": 0.1}),
        ({"cache": "none", "threshold": "None", "steps": "12"}, {}, {"cache": "none", "steps": 12}),
    ],
)  # fmt: skip
def test_whose_settings_count(
    demo: tuple[Any, Any], model_args: dict[str, Any], kwargs: dict[str, Any], wanted: dict[str, Any]
) -> None:
    lm = FastDLLM(demo[0], tokenizer=demo[1], **model_args)
    config, stops = lm._settings({"until": ["a"], **kwargs})
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert stops == ["a"]


def test_every_field_of_a_generation_is_a_model_argument(demo: tuple[Any, Any], tmp_path: Path) -> None:
    for field in dataclasses.fields(fd.GenerationConfig):
        lm = FastDLLM(demo[0], tokenizer=demo[1], **{field.name: field.default})
        assert getattr(lm.config, field.name) == field.default
    fd.GenerationConfig(steps=9, gen_length=96, suffix=4).save_pretrained(tmp_path)
    lm = FastDLLM(demo[0], tokenizer=demo[1], generation_config=str(tmp_path), threshold=0.7)
    assert lm.config == fd.GenerationConfig(threshold=0.7, gen_length=96, suffix=4)
    assert lm._settings({"max_gen_toks": 40, "temperature": 1.0})[0] == lm.config


def test_top_p_is_for_families_that_have_it(
    demo: tuple[Any, Any], backend: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    kwargs = {"do_sample": True, "top_p": 0.5, "top_k": 3, "num_beams": 4}
    for _ in range(2):
        assert backend()._settings(kwargs)[0].top_p is None
    assert "llada has no top_p" in caplog.text
    dream = FastDLLM(tiny_dream(), tokenizer=demo[1], gen_length=8)
    caplog.clear()
    for _ in range(2):
        config, _ = dream._settings(kwargs)
    assert (config.temperature, config.top_p, config.top_k) == (1.0, 0.5, 3)
    assert [record.message for record in caplog.records] == [
        "gen_kwargs: num_beams=4 means nothing to a diffusion model; ignored"
    ]


def test_sampling_does_not_depend_on_batches(backend: Callable[..., Any], demo: tuple[Any, Any]) -> None:
    requests = [ask(problem.prompt, i, repeats=2) for i, problem in enumerate(PROBLEMS[:3])]
    requests = [request for request in requests for _ in range(2)]
    arguments = {"temperature": 3.0, "threshold": 0.5, "gen_length": 32}
    found = [backend(batch_size=n, seed=5, **arguments).generate_until(requests) for n in (1, 4)]
    assert found[0] == found[1]
    assert found[0] != backend(seed=6, **arguments).generate_until(requests)
    assert any(a != b for a, b in zip(found[0][::2], found[0][1::2], strict=True)), (
        "answers to one prompt differ"
    )
    prompt = tokens_of(demo[1], PROBLEMS[1].prompt)
    output = fd.generate(demo[0], [prompt], seed=[request_seed(5, prompt.tolist(), 1)], **arguments)
    assert found[0][3] == demo[1].decode(output.answers()[0], skip_special_tokens=True)


def test_long_prompts_lose_their_beginning(
    backend: Callable[..., Any], demo: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    prompt = PROBLEMS[1].prompt
    tokens = demo[1](prompt)["input_ids"]
    lm = backend(max_length=128 + len(tokens) - 3)
    found = lm.generate_until([ask(prompt), ask("Add 4")])
    assert "1 of 2 prompts are longer" in caplog.text
    output = fd.generate(demo[0], [torch.tensor(tokens[3:])], **SETTINGS)
    assert found[0] == demo[1].decode(output.answers()[0], skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"gen_length=512: leaves no room .* takes at most 511"):
        backend(gen_length=512).generate_until([ask(prompt)])


def test_batch_size_auto(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    rows: list[int] = []
    generate = fd.generate
    monkeypatch.setattr(fd, "generate", lambda m, p, **k: rows.append(len(p)) or generate(m, p, **k))
    lm = backend(batch_size="auto:4", max_batch_size=3, gen_length=8)
    lm.generate_until([ask(p.prompt) for p in PROBLEMS[:7]])
    assert rows == [3, 3, 1]
    # On a GPU as many as its free memory holds: here what two rows need.
    lm._device = torch.device("cuda")
    lm.max_batch_size = 7
    two = fd.memory_needed(lm.model, [80 + 8] * 2, lm.config)["total"] / harness.FREE_SHARE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(two) + 8, 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    jobs = lm._jobs([ask("7" * 80)] * 7, [(i, 0) for i in range(7)], lm.config)
    assert len(jobs[0].prompt) == 80
    assert [len(batch) for batch in lm._batches(jobs, lm.config)] == [2, 2, 2, 1]


# --- Prompts ---------------------------------------------------------------------------------------


def test_chat_template(
    monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any], demo: tuple[Any, Any], tasks: Path
) -> None:
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.chat_template = TEMPLATE
    prompts: list[list[int]] = []
    generate = fd.generate

    def spy(model: Any, rows: Any, **arguments: Any) -> Any:
        prompts.extend(row.tolist() for row in rows)
        return generate(model, rows, **arguments)

    monkeypatch.setattr(fd, "generate", spy)
    lm = backend(tokenizer=tokenizer, gen_length=8)
    results = evaluate(
        tasks, lm, apply_chat_template=True, system_instruction="15", fewshot_as_multiturn=False, limit=4
    )
    assert sorted(prompts) == sorted(tokenizer(f"Sort 15 and {p.prompt}.")["input_ids"] for p in PROBLEMS[:4])
    assert lm.chat_template(True) == TEMPLATE
    assert lm.chat_template(False) is None
    assert results["config"]["fastdllm"]["generation"]["gen_length"] == 8
    assert lm.tokenizer_name == str(tokenizer.name_or_path).replace("/", "__")
    begun = [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "Sum: 4"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "Add and Sum: 4"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="apply_chat_template: the tokenizer has no chat template"):
        lm.chat_template(True)


def test_bos(backend: Callable[..., Any], demo: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.bos_token = tokenizer.mask_token  # any special token will do
    plain = demo[1]("Add")["input_ids"]
    bos = tokenizer.bos_token_id
    wanted = {None: plain, False: plain, True: [bos, *plain]}
    for choice, tokens in wanted.items():
        lm = backend(tokenizer=tokenizer, add_bos_token=choice)
        assert lm.tok_encode("Add") == tokens
        assert lm.tok_encode("Add", add_special_tokens=False) == plain
        assert lm.tok_encode(f"{tokenizer.bos_token}Add") == [bos, *plain]
        assert lm.prefix_token_id == bos
    assert backend().prefix_token_id == demo[0].config.eos_token_id == backend().eot_token_id


# --- Likelihood ------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_loglikelihood(backend: Callable[..., Any], demo: tuple[Any, Any]) -> None:
    """In the order of the requests, by the seed, whatever the batch; an answer of one token exactly."""
    model, tokenizer = demo
    texts = [(p.prompt, p.answer) for p in PROBLEMS[:3]] + [
        (PROBLEMS[3].prompt, "7"),
        ("", "Sum"),
        ("Add", " 4 "),
    ]
    found = backend(mc_samples=6, mc_batch_size=4, seed=7, is_greedy=False, batch_size=2).loglikelihood(
        [pair(*text) for text in texts], disable_tqdm=True
    )
    assert not any(greedy for _, greedy in found)
    for (context, continuation), (value, _) in zip(texts, found, strict=True):
        prompt = tokens_of(tokenizer, context) if context else torch.tensor([model.config.eos_token_id])
        answer = tokens_of(tokenizer, context + continuation)[len(prompt) if context else 0 :]
        wanted = fd.loglikelihood(model, [prompt], [answer], samples=6, batch_size=4, seed=[7])
        assert value == pytest.approx(float(wanted), abs=1e-3)
        assert (
            value
            != pytest.approx(
                float(fd.loglikelihood(model, [prompt], [answer], samples=6, batch_size=4, seed=[8])),
                abs=1e-3,
            )
            or len(answer) == 1
        )


def one_by_one(model: Any, prompt: torch.Tensor, length: int) -> list[int]:
    """Greedy decoding of so many masks by the model's own forward, the surest one at a time."""
    mask = model.config.mask_token_id
    row = torch.cat((prompt, torch.full((length,), mask)))
    while bool((row == mask).any()):
        with torch.no_grad():
            logits = model(row[None]).logits[0].double()
        confidence = logits.softmax(-1)
        confidence[:, mask] = -1
        best, tokens = confidence.max(-1)
        at = int(best.masked_fill(row != mask, -1).argmax())
        row[at] = tokens[at]
    return row[len(prompt) :].tolist()


def test_is_greedy_is_what_decoding_one_token_a_forward_gives(
    backend: Callable[..., Any], demo: tuple[Any, Any]
) -> None:
    model, tokenizer = demo
    contexts = [problem.prompt for problem in PROBLEMS[:3]]
    lengths = [9, 4, 1]
    said = [
        tokenizer.decode(one_by_one(model, tokens_of(tokenizer, c), n))
        for c, n in zip(contexts, lengths, strict=True)
    ]
    wrong = [text[:-1] + ("1" if text[-1] != "1" else "2") for text in said]
    lm = backend(mc_samples=1, batch_size=4)
    found = lm.loglikelihood(
        [pair(c, t) for texts in (said, wrong) for c, t in zip(contexts, texts, strict=True)],
        disable_tqdm=True,
    )
    assert [greedy for _, greedy in found] == [True] * 3 + [False] * 3


def test_rolling_covers_every_token_once(backend: Callable[..., Any], demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    text = PROBLEMS[0].answer
    tokens = tokenizer(text)["input_ids"]
    lm = backend(mc_samples=3, mc_batch_size=2, seed=2, max_length=10)
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))])
    windows = [([model.config.eos_token_id], tokens[:9])]
    for begin in range(9, len(tokens), 9):
        end = min(begin + 9, len(tokens))
        windows.append((tokens[end - 10 : begin], tokens[begin:end]))
    assert [token for _, answer in windows for token in answer] == tokens
    assert len(windows) > 2
    wanted = sum(
        float(
            fd.loglikelihood(model, [torch.tensor(p)], [torch.tensor(a)], samples=s, batch_size=2, seed=[2])
        )
        for p, a in windows
        for s in [3 if len(a) > 1 else 1]
    )
    assert found == pytest.approx(wanted, abs=1e-3)


def test_long_likelihoods_lose_their_beginning(
    backend: Callable[..., Any], demo: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    lm = backend(mc_samples=2, max_length=12, is_greedy=False)
    prompt, answer = list(range(20, 40)), list(range(50, 55))
    (found,) = lm._loglikelihood_tokens([(("a", "b"), prompt, answer)], disable_tqdm=True)
    assert "1 of 1 requests are longer than max_length, 12" in caplog.text
    assert "is_greedy=False" in caplog.text
    rows = [torch.tensor(prompt[-7:])], [torch.tensor(answer)]
    assert found[0] == pytest.approx(float(fd.loglikelihood(demo[0], *rows, samples=2, seed=[0])), abs=1e-3)


# --- Resuming, and several processes ---------------------------------------------------------------


def in_other_processes(function: Callable[..., None], *calls: tuple[Any, ...]) -> list[int]:
    """Exit codes of a process for each call. All are forks of one that has imported what they need.

    Not of this one, whose OpenMP threads a fork would wait for in vain.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lm_eval.evaluator", "datasets", "fastdllm_ext.eval.harness"])
    processes = [context.Process(target=function, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
        process.join()
    return [process.exitcode if process.exitcode is not None else -1 for process in processes]


def killed_after_two_batches(tasks: Path, cache: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = fd.load(fd.demo_model_path(), device="cpu")
    lm = FastDLLM(model, tokenizer=tokenizer, batch_size=2, **SETTINGS)
    answer, calls = lm._answer, iter(range(100))
    lm._answer = lambda *arguments: os._exit(9) if next(calls) == 2 else answer(*arguments)
    evaluate(tasks, lm, use_cache=cache)


def one_of_two(rank: int, port: int, tasks: Path, results: Path) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    ticks = iter(range(1000))
    harness.clock = lambda: float(next(ticks)) * (rank + 1)
    lm = FastDLLM(str(fd.demo_model_path()), batch_size=4, device="cpu", **SETTINGS)
    found = evaluate(tasks, lm)
    assert (found is not None) is (rank == 0)
    assert bool(harness.latest_throughput()) is (rank == 0)
    if found is not None:
        kept = {name: found[name] for name in ("results", "config", "samples")}
        results.write_text(json.dumps(kept, default=str), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_killed_run_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any], tasks: Path, tmp_path: Path
) -> None:
    rows: list[int] = []
    generate = fd.generate

    def counted(model: Any, prompts: Any, **arguments: Any) -> Any:
        rows.append(len(prompts))
        return generate(model, prompts, **arguments)

    monkeypatch.setattr(fd, "generate", counted)
    cache = str(tmp_path / "answers")
    assert in_other_processes(killed_after_two_batches, (tasks, cache)) == [9]
    results = evaluate(tasks, backend(batch_size=2), use_cache=cache)
    assert sum(rows) == len(PROBLEMS) - 4
    assert results["config"]["fastdllm"]["throughput"]["all"]["requests"] == len(PROBLEMS) - 4
    rows.clear()
    again = evaluate(tasks, backend(batch_size=3), use_cache=cache)
    assert rows == []
    assert again["config"]["fastdllm"]["throughput"] == {}
    assert again["results"] == results["results"]
    assert [s["resps"] for s in again["samples"]["whole"]] == [
        s["resps"] for s in results["samples"]["whole"]
    ]
    with pytest.raises(
        ValueError, match=r"use_cache: .* with threshold=0.9; takes a new one for threshold=0.8"
    ):
        evaluate(tasks, backend(threshold=0.8), use_cache=cache)


def test_likelihoods_are_kept_batch_by_batch(
    monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any], tmp_path: Path
) -> None:
    requests = [pair(p.prompt, p.answer[:8]) for p in PROBLEMS[:4]]
    cached = CachingLM(backend(mc_samples=2, mc_batch_size=2), str(tmp_path / "a.db"))
    calls: list[int] = []
    score = fd.loglikelihood

    def stopping(model: Any, prompts: Any, answers: Any, **arguments: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(model, prompts, answers, **arguments)

    monkeypatch.setattr(fd, "loglikelihood", stopping)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(requests)
    found = cached.loglikelihood(requests)
    assert calls == [1, 1, 1, 1, 1]
    monkeypatch.setattr(fd, "loglikelihood", score)
    wanted = backend(mc_samples=2, mc_batch_size=2).loglikelihood(requests)
    assert [flag for _, flag in found] == [flag for _, flag in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted])
    texts = [Instance("loglikelihood_rolling", {}, (p.answer,), 0, ("task", 0, 1)) for p in PROBLEMS[:2]]
    rolled = cached.loglikelihood_rolling(texts)
    monkeypatch.setattr(fd, "loglikelihood", None)
    assert cached.loglikelihood_rolling(texts) == rolled


def test_a_cache_of_another_backend_is_refused(backend: Callable[..., Any], tmp_path: Path) -> None:
    other = CachingLM(get_model("dummy")(), str(tmp_path / "a.db"))
    other.generate_until([ask("Add 1 and 2.")])
    with pytest.raises(ValueError, match="use_cache: the file holds answers of another backend"):
        CachingLM(backend(), str(tmp_path / "a.db"))


def test_two_processes_share_the_requests(demo: tuple[Any, Any], tasks: Path, tmp_path: Path) -> None:
    """As accelerate and torchrun start them. One has a request less, and gets a copy that is not counted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = tmp_path / "results.json"

    assert in_other_processes(one_of_two, *((rank, port, tasks, results) for rank in (0, 1))) == [0, 0]
    found = json.loads(results.read_text(encoding="utf-8"))
    wanted = [alone(demo, problem) for problem in PROBLEMS]
    samples = sorted(found["samples"]["whole"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [text for text, _, _ in wanted]
    figures = found["config"]["fastdllm"]["throughput"]["all"]
    assert figures["requests"] == len(PROBLEMS)
    assert figures["tokens"] == sum(n for _, n, _ in wanted)
    assert figures["seconds"] == 2 * 2, "two batches of the slower process, each two seconds by its clock"
    assert found["config"]["fastdllm"]["processes"] == 2


# --- Settings files --------------------------------------------------------------------------------


def parsed(argv: list[str]) -> dict[str, Any]:
    """What lm_eval makes of our arguments."""
    namespace = HarnessCLI()._parser.parse_args(lm_eval_arguments(argv))
    return dataclasses.asdict(EvaluatorConfig.from_cli(namespace))


@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("over", ["", ",baseline", ",dream"])
@pytest.mark.parametrize("name, shots", [("gsm8k", 5), ("minerva_math", 4), ("humaneval", 0), ("mbpp", 3)])
def test_settings_build_generations(name: str, shots: int, over: str, length: int) -> None:
    argv = ["--settings", name + over, "--model_args", f"gen_length={length}"]
    found = parsed(argv)
    assert found["model"] == "fastdllm"
    assert found["num_fewshot"] == shots
    assert [task.removesuffix("_instruct") for task in found["tasks"]] == [name]
    names = {field.name for field in dataclasses.fields(fd.GenerationConfig)}
    config = fd.GenerationConfig(**{k: v for k, v in found["model_args"].items() if k in names})
    assert (config.gen_length, config.block_length) == (length, 32)
    if over == ",baseline":
        assert (config.threshold, config.cache, config.stop_on_eos) == (None, "none", False)
        assert config.steps is not None
        assert config.steps >= length
    else:
        assert (config.threshold, config.cache) == (0.9, "dual")
    dream = over == ",dream"
    assert found["apply_chat_template"] is not dream
    assert found["fewshot_as_multiturn"] is False
    assert found["model_args"]["pretrained"].startswith("Dream-org" if dream else "GSAI-ML/LLaDA-8B-Instruct")
    assert found["confirm_run_unsafe_code"] is False


def test_every_settings_file_is_lm_evals_own_format() -> None:
    assert settings_names() == ["baseline", "dream", "gsm8k", "humaneval", "mbpp", "minerva_math"]
    folder = Path(fd.__file__).parent / "eval" / "settings"
    for name in settings_names():
        config = EvaluatorConfig.from_config(folder / f"{name}.yaml")
        assert config.model_args == read_settings(name)["model_args"]


def test_the_baseline_takes_one_forward_a_token(backend: Callable[..., Any]) -> None:
    lm = backend(**{**read_settings("baseline")["model_args"], "gen_length": 64, "threshold": None})
    lm.generate_until([ask(PROBLEMS[2].prompt)])
    assert lm.throughput.answers[0].nfe == 64


def test_what_the_user_gives_lies_over_settings(tmp_path: Path) -> None:
    assert parsed(["--tasks", "a"])["model"] == "fastdllm"
    assert parsed(["--tasks", "a", "-M", "hf"])["model"] == "hf"
    assert lm_eval_arguments(["run", "--tasks", "a"]) == lm_eval_arguments(["--tasks", "a"])
    assert lm_eval_arguments(["ls", "tasks"]) == ["ls", "tasks"]
    found = parsed(
        ["--settings", "gsm8k", "-t", "mine", "-a", "pretrained=x,steps=4", "-a", "cache=none", "eps=0.01",
         "--num_fewshot", "1", "--limit", "3"]
    )  # fmt: skip
    wanted = {
        "pretrained": "x",
        "gen_length": 256,
        "block_length": 32,
        "steps": 4,
        "cache": "none",
        "eps": 0.01,
    }
    assert found["model_args"] == wanted
    assert (found["tasks"], found["num_fewshot"], found["limit"]) == (["mine"], 1, 3)
    (tmp_path / "a.yaml").write_text("model: hf\nmodel_args: {pretrained: y}\ntasks: [b]\n", encoding="utf-8")
    assert parsed(["--config", str(tmp_path / "a.yaml")])["model"] == "hf"
    assert parsed(["--settings", str(tmp_path / "a.yaml")])["model"] == "hf"
    below = {"model_args": {"threshold": 0.9, "cache": "dual"}, "gen_kwargs": {"a": 1}, "limit": 2}
    assert merged(below, {"model_args": {"threshold": 0.8}, "gen_kwargs": {"b": 2}, "limit": None}) == {
        "model_args": {"threshold": 0.8, "cache": "dual"},
        "gen_kwargs": {"a": 1, "b": 2},
        "limit": None,
    }


# --- Loading, and bad input ------------------------------------------------------------------------


def test_remote_code_is_asked_for_by_name(tmp_path: Path, demo: tuple[Any, Any]) -> None:
    """A checkpoint whose configuration names classes in a file of its own."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(fd.demo_model_path(), folder)
    (folder / "modeling_theirs.py").write_text(
        "from fastdllm_ext.models.llada import LLaDAConfig\n"
        "from fastdllm_ext.models import LLaDAModelLM\n\n\n"
        "class Config(LLaDAConfig):\n    pass\n\n\n"
        "class Theirs(LLaDAModelLM):\n    config_class = Config\n",
        encoding="utf-8",
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "modeling_theirs.Config", "AutoModel": "modeling_theirs.Theirs"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ours, theirs = (
        FastDLLM(str(folder), trust_remote_code=trusted, device="cpu", dtype="float32", **SETTINGS)
        for trusted in (False, True)
    )
    assert type(ours.model) is type(demo[0])
    assert type(theirs.model).__name__ == "Theirs"
    with pytest.raises(ValueError, match=r"trust_remote_code=True: .* brings no modeling code"):
        FastDLLM(str(fd.demo_model_path()), trust_remote_code=True)
    assert theirs.generate_until([ask(PROBLEMS[0].prompt)]) == [alone(demo, PROBLEMS[0])[0]]


def test_patch_options_and_devices(caplog: pytest.LogCaptureFixture) -> None:
    lm = FastDLLM(
        str(fd.demo_model_path()), device="cuda:0" if not torch.cuda.is_available() else "cpu",
        dtype="bfloat16", runtime="modules", kv_cache_dtype="fp8", tokenizer=str(fd.demo_model_path()),
    )  # fmt: skip
    options = patched_options(lm.model)
    assert (options.runtime, options.quantization, options.kv_cache_dtype) == ("modules", "none", "fp8")
    assert lm.get_model_info()["fastdllm"]["options"] == dataclasses.asdict(options)
    assert lm.get_model_info()["model_dtype"] == "torch.bfloat16"
    assert lm.device.type == "cpu"
    if not torch.cuda.is_available():
        assert "device=cuda:0: there is no CUDA device" in caplog.text


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, r"unknown model arguments 'treshold', 'zzz'; takes pretrained, .*is_greedy, .*threshold",
         {"treshold": 0.9, "zzz": 1}),
        (ValueError, r"^infill=True: .* takes False", {"infill": True}),
        (TypeError, r"^gen_length=\[3, 4\]; an evaluation takes one int", {"gen_length": [3, 4]}),
        (TypeError, r"^seed=\[3\]; an evaluation takes one int", {"seed": [3]}),
        (ValueError, r"^steps=4, threshold=0.9: takes only one of", {"steps": 4}),
        (ValueError, r"^cache='trial'; takes one of none, prefix, dual", {"cache": "trial"}),
        (ValueError, r"^batch_size='many'; takes a number of rows, or 'auto'", {"batch_size": "many"}),
        (ValueError, r"^batch_size=0; takes 1 or more", {"batch_size": "0"}),
        (ValueError, r"^max_batch_size=0; takes 1 or more", {"max_batch_size": 0}),
        (ValueError, r"^mc_samples=0; takes 1 or more", {"mc_samples": 0}),
        (TypeError, r"^mc_batch_size='x'; takes an int", {"mc_batch_size": "x"}),
        (TypeError, r"^is_greedy='perhaps'; takes True or False", {"is_greedy": "perhaps"}),
        (TypeError, r"^add_bos_token='x'; takes True, False or None", {"add_bos_token": "x"}),
        (ValueError, r"^add_bos_token=True: the tokenizer has no BOS token", {"add_bos_token": True}),
        (ValueError, r"^tokenizer=None: the model comes with none", {"tokenizer": None}),
        (ValueError, r"^max_length=513; takes at most the model's 512", {"max_length": 513}),
        (ValueError, r"^max_length=1; takes 2 or more", {"max_length": 1}),
        (ValueError, r"^dtype='bfloat16', .* loaded already takes none", {"dtype": "bfloat16"}),
        (ValueError, r"^quantization='int3'; takes one of none, int8, fp8", {"quantization": "int3"}),
        (OSError, r"nowhere", {"generation_config": "./nowhere"}),
    ],
)  # fmt: skip
def test_bad_arguments(
    backend: Callable[..., Any], error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        backend(**arguments)


def test_a_bad_dtype() -> None:
    for dtype in ("float31", "nn"):
        with pytest.raises(ValueError, match=rf"^dtype='{dtype}'; takes 'auto', 'float32'"):
            FastDLLM(str(fd.demo_model_path()), dtype=dtype)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tasks", "a", "--model_args", "pretrained=x,treshold=1"], "unknown model arguments 'treshold'"),
        (["--settings", "gsm9k"], "--settings gsm9k; takes one of baseline, dream, gsm8k"),
        (["--settings", "gsm8k", "--config", "a.yaml"], "--config a.yaml; takes one of them"),
    ],
)
def test_bad_command_lines(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdllm-ext eval: ")
    assert message in error


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fails before the backend is asked for; then the message says what to install."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(fd, "eval", sys.modules["fastdllm_ext.eval"])
    for name in ("fastdllm_ext.eval.harness", "fastdllm_ext.eval"):
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("fastdllm_ext.eval")
    with pytest.raises(ImportError, match=r'pip install "fastdllm_ext\[eval\]"'):
        _ = again.FastDLLM
    with pytest.raises(AttributeError, match="no attribute 'Fast'"):
        _ = again.Fast
    assert run(["--tasks", "a"]) == 2
    assert 'pip install "fastdllm_ext[eval]"' in capsys.readouterr().err


def test_importing_the_package_imports_neither_backend_nor_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = ("matplotlib", "datasets", "lm_eval", "fastdllm_ext.eval")
    monkeypatch.setattr(fd, "eval", sys.modules["fastdllm_ext.eval"])
    for name in [name for name in sys.modules if name.startswith(heavy)]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("fastdllm_ext.eval")
    registry: Any = sys.modules["lm_eval.api.registry"].model_registry
    assert {"fastdllm", "hf", "vllm"} <= set(registry.keys()), "lm_eval's own are not lost"
    found = {name for name in sys.modules if name.startswith(heavy)}
    assert {name for name in found if name.startswith("fastdllm_ext")} == {"fastdllm_ext.eval"}
    assert not found & {"matplotlib", "datasets", "lm_eval.api.model", "lm_eval.evaluator"}
