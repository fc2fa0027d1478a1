from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdllm_ext.demo_tasks import held_out
from fastdllm_ext.eval.tasks import open_task


def test_the_demo_task_is_the_held_out_problems() -> None:
    task = open_task("demo", 7, seed=3)
    wanted = held_out(7, 3)
    assert [p.prompt for p in task.problems] == [p.prompt for p in wanted]
    assert [p.family for p in task.problems] == [p.family for p in wanted]
    assert [p.score(q.answer) for p, q in zip(task.problems, wanted, strict=True)] == [1.0] * 7
    assert task.problems[0].score(wanted[1].answer) == 0.0
    # A longer list of the same seed begins with the shorter one: a report can be given more problems.
    assert [p.prompt for p in open_task("demo", 20, seed=3).problems[:7]] == [p.prompt for p in wanted]


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    lines = [
        {"prompt": "1+1=", "answer": "2", "until": ["\n", ";"], "family": "sum"},
        {"prompt": "2+2=", "answer": "4"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    task = open_task(str(path), 10, chat=lambda text: f"<{text}>")
    assert [p.prompt for p in task.problems] == ["<1+1=>", "<2+2=>"]
    assert task.problems[0].score(" 2;3\n4") == 1.0
    assert task.problems[0].score("3;2") == 0.0
    assert task.problems[1].score("4;") == 0.0
    assert [p.family for p in task.problems] == ["sum", ""]
    assert len(open_task(str(path), 1).problems) == 1


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two tasks of lm-eval over data of their own, one that runs code; how to find them."""
    tmp_path = tmp_path_factory.mktemp("tasks")
    with open(tmp_path / "data.jsonl", "w", encoding="utf-8") as file:
        for i in range(6):
            file.write(json.dumps({"question": f"What is {i}+{i}?", "answer": str(2 * i)}) + "\n")
    sums = f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}, train: {tmp_path / "data.jsonl"}}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"]}}
num_fewshot: 0
filter_list:
  - name: number
    filter:
      - {{function: regex, regex_pattern: "(\\\\d+)"}}
      - {{function: take_first}}
  - name: whole
    filter:
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    (tmp_path / "sums.yaml").write_text(sums)
    (tmp_path / "code.yaml").write_text(sums.replace("task: sums", "task: sums_by_code\nunsafe_code: true"))
    return {"include_path": str(tmp_path)}


def test_an_lm_eval_task(where: dict[str, Any]) -> None:
    task = open_task("sums", 4, **where)
    assert [p.prompt for p in task.problems] == [f"Q: What is {i}+{i}?\nA:" for i in range(4)]
    assert task.metric == "exact_match,number"
    assert [task.problems[3].score(text) for text in ("it is 6.", "6\n7", "7", "none")] == [1, 1, 0, 0]
    whole = open_task("sums", 4, metric="exact_match,whole", **where)
    assert [whole.problems[3].score(text) for text in ("it is 6.", "6")] == [0, 1]
    shots = open_task("sums", 4, shots=2, **where)
    assert all(p.prompt.count("Q: ") == 3 for p in shots.problems)
    with pytest.raises(
        ValueError, match="metric='f1'; task 'sums' has exact_match,number, exact_match,whole"
    ):
        open_task("sums", 4, metric="f1", **where)


def test_code_of_the_model_runs_only_where_that_is_said(where: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="runs code that the model wrote; takes --confirm-run-unsafe-code"):
        open_task("sums_by_code", 1, **where)
    assert len(open_task("sums_by_code", 1, run_unsafe_code=True, **where).problems) == 1


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "holds no problem"),
        ("no json", "line 1"),
        ('{"prompt": "a"}', "no 'answer'"),
        ("[1]", "no 'prompt'"),
        ('{"prompt": "a", "answer": "b", "anser": "c"}', "unknown 'anser'; takes prompt"),
        ('{"prompt": "a", "answer": 3}', "answer=3; takes a str"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        open_task(str(path), 3)


def test_bad_tasks_are_named(tmp_path: Path, where: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="limit=0; takes 1 or more"):
        open_task("demo", 0)
    with pytest.raises(ValueError, match="shots=2"):
        open_task("demo", 1, shots=2)
    with pytest.raises(ValueError, match="task 'gsm9k' is unknown; takes 'demo'"):
        open_task("gsm9k", 1, **where)
    with pytest.raises(OSError, match=r"none\.jsonl"):
        open_task(str(tmp_path / "none.jsonl"), 1)
