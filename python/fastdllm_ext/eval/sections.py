"""A report's sections, for whatever renders them: a title, sentences, the names of figures, a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Facts = dict[str, Any]
Section = dict[str, Any]  # title, text, figures, table: {head, rows, marked}


def build_sections(facts: Facts) -> list[Section]:
    """The sections of what was measured."""
    makers = {"settings": _tradeoff, "kv_similarity": _similarity, "drift": _drift, "theorem": _theorem}
    return [section for key, make in makers.items() if key in facts for section in make(facts)]


def problems_said(facts: Facts) -> str:
    """How many problems there were, where some settings had more than others both numbers."""
    every, more = (facts.get(key) for key in ("settings", "key_settings"))
    if not every or not more:
        return f"{facts['conditions']['problems']:,} problems"
    return f"{more[0]['problems']:,} problems for some settings, the first {every[0]['problems']:,} for all"


def percent(triple: Sequence[float], digits: int = 1) -> str:
    """97.3 (96.1 to 98.2)."""
    value, low, high = (f"{100 * x:.{digits}f}" for x in triple)
    return f"{value} ({low} to {high})"


def _tradeoff(facts: Facts) -> Iterator[Section]:
    rows, c = facts["settings"], facts["conditions"]
    base = rows[0]
    lost = [row for row in rows[1:] if row["loss_at_most"] <= 0.02]
    fastest = max(lost, key=lambda row: row["tokens_per_second"][0], default=None)
    text = [
        f"The baseline takes one token a step without a cache: {100 * base['accuracy'][0]:.1f} % right, "
        f"{base['tokens_per_second'][0]:,.0f} tokens/s, {base['nfe'][0]:.1f} forwards a problem. It stops "
        "at "
        "the end of the text, as all else here does.",
    ]
    if fastest is not None:
        text.append(
            f"The fastest setting that loses less than 2 points (with 95 % confidence): {fastest['label']}, "
            f"{100 * fastest['accuracy'][0]:.1f} % right, "
            f"{fastest['speedup']:.1f} times as fast."
        )
    for row in facts["key_settings"] or rows:
        if row["setting"] in facts["own"]:
            text.append(
                f"Chosen beforehand: {row['label']}: {percent(row['accuracy'])} % right on "
                f"{row['problems']:,} problems, {100 * row['loss'][0]:.2f} points less than the baseline (at "
                f"most {100 * row['loss_at_most']:.2f} with 95 % confidence), {row['speedup']:.1f} times as "
                "fast."
            )
    yield {"title": "Accuracy against speed", "text": text, "figures": ["tradeoff.png"]}
    if facts["key_settings"]:
        yield {
            "title": "On more problems",
            "text": [
                f"The settings that conclusions rest on, over {facts['key_settings'][0]['problems']:,} "
                f"problems; all else is over the first {base['problems']:,} of them."
            ],
            "table": _settings(facts["key_settings"]),
        }
    yield {
        "title": "Thresholds against a fixed number of tokens a step",
        "text": [
            "A threshold spends forwards where the model is in doubt; a fixed number of tokens a step "
            "spends them evenly (the paper's figure 5). The second picture has all rules side by side."
        ],
        "figures": ["thresholds.png", "rules.png"],
    }
    yield {
        "title": "Block lengths",
        "text": ["The paper's figure 4. Short blocks refresh often, long ones keep what is out of date."],
        "figures": ["blocks.png"],
    }
    compared = {
        "prompt_lengths": ("Prompt lengths", "problems by the length of their prompt, a third each"),
        "shots": ("Worked examples before the prompt", "the same problems"),
        "gen_lengths": ("Generation lengths", "the same problems"),
    }
    for key, (title, what) in compared.items():
        if facts.get(key):
            yield {"title": title, "text": [_cells_say(what)], "table": _comparison(facts[key])}
    yield {
        "title": "Every setting",
        "text": [
            f"Generation length {c['gen_length']}, block length {c['block_length']} where nothing else is "
            f"said, batch {c['batch_size']}. Intervals: 95 %, bootstrap over problems (of speed: over "
            "batches). Tokens count up to and including EOS. Loss: the baseline's accuracy minus the "
            "setting's, and the most it is with 95 % confidence, both in points. Same: answers equal to "
            "the baseline's. In bold, what no other setting in the table beats."
        ],
        "table": _settings(rows),
    }


def _settings(rows: Sequence[Facts]) -> Facts:
    return {
        "head": ["setting", "accuracy, %", "loss", "at most", "same, %", "tokens/s", "speed-up",
                 "tokens/forward", "NFE"],
        "rows": [_setting(row) for row in rows],
        "marked": [i for i, row in enumerate(rows) if row["on_front"]],
    }  # fmt: skip


def _setting(row: Facts) -> list[str]:
    speed = row["tokens_per_second"]
    return [
        row["label"],
        percent(row["accuracy"]),
        f"{100 * row['loss'][0]:.1f}",
        f"{100 * row['loss_at_most']:.1f}",
        f"{100 * row['same_answer']:.1f}",
        f"{speed[0]:,.0f} ({speed[1]:,.0f} to {speed[2]:,.0f})",
        f"{row['speedup']:.1f}x",
        f"{row['tokens_per_forward'][0]:.2f}",
        f"{row['nfe'][0]:.1f}",
    ]


def _cells_say(what: str) -> str:
    return f"{what[0].upper()}{what[1:]}. A cell: accuracy in %, tokens/s, and the speed-up over the first."


def _comparison(rows: Sequence[Facts]) -> Facts:
    def cell(c: Facts) -> str:
        return f"{100 * c['accuracy'][0]:.1f} / {c['tokens_per_second'][0]:,.0f} ({c['speedup']:.1f}x)"

    return {
        "head": ["", "problems", *(c["label"] for c in rows[0]["cells"])],
        "rows": [[row["name"], str(row["problems"]), *map(cell, row["cells"])] for row in rows],
    }


def _similarity(facts: Facts) -> Iterator[Section]:
    found = facts["kv_similarity"]
    yield {
        "title": "Keys and values from step to step",
        "text": [
            "Cosine similarity of each position's keys, and values, between two denoising steps of a "
            "decode that computes everything anew at every step, one token a step; the mean over "
            f"positions, heads and {found['conditions']['prompts']} prompts. Where it stays near 1, what "
            "was computed once is still good later: that is why keys and values can be cached at all (the "
            "paper's figure 3)."
        ],
        "figures": ["kv_similarity.png", "kv_similarity_layers.png"],
    }


def _decoded(found: Facts) -> str:
    c = found["conditions"]
    return f"Decoded by {c['rule']}, {c['prompts']} prompts."


def _drift(facts: Facts) -> Iterator[Section]:
    rows = [
        [
            cache,
            str(group["tokens"]),
            percent(group["other_token"], 2),
            percent(group["not_selected"], 2),
            f"{group['confidence_difference']['mean']:+.4f}",
            f"{group['confidence_difference']['mean_absolute']:.4f}",
        ]
        for cache, found in facts["drift"]["caches"].items()
        if (group := found["all"]) is not None
    ]
    head = ["cache", "tokens", "other token, %", "not selected, %", "confidence, mean", "mean absolute"]
    yield {
        "title": "Drift: what a cache changes",
        "text": [
            "Block steps against what the uncached model says of the same row at the same moment. Other "
            "token: it has another candidate at a position that the step filled. Not selected: its own "
            "rule would have left that position for later. Confidence: cached minus uncached. Intervals "
            "take the tokens to be independent. " + _decoded(facts["drift"])
        ],
        "figures": ["drift.png"],
        "table": {"head": head, "rows": rows},
    }


def _theorem(facts: Facts) -> Iterator[Section]:
    rows = []
    for cache, found in facts["theorem"]["caches"].items():
        for side, group in found["groups"].items():
            shares = ["" if x is None else percent(x) for x in (found["inside"], group["share"])]
            rows.append([cache, shares[0], side, str(group["checked"]), shares[1]])
    yield {
        "title": "Theorem 1 at work",
        "text": [
            "Of the steps that commit n tokens at once, n being 2 or more, and ε one minus the least "
            "confidence among them: the share with (n + 1) ε <= 1, where by the theorem greedy parallel "
            "decoding equals greedy decoding one by one; and how often it does, there (inside) and "
            "elsewhere (outside), on steps drawn of either kind. The theorem takes the model's marginals "
            "to be those of one joint distribution, which no training enforces, so that steps inside may "
            "disagree too. " + _decoded(facts["theorem"])
        ],
        "figures": ["theorem.png"],
        "table": {
            "head": ["cache", "steps inside, %", "side", "checked", "all tokens agree, %"],
            "rows": rows,
        },
    }
