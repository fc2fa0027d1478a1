from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from backends import Backend, each_backend, each_compiled
from fastdllm_ext import reference
from fastdllm_ext.ops import Knob, Row, Rule, Score

MASK = 7
EOS = 3


class Batch:
    """Sequences with a prompt of 5 tokens and `masks` masked positions, and logits for those."""

    def __init__(
        self,
        masks: list[int],
        *,
        vocab: int = 1000,
        dtype: torch.dtype = torch.float32,
        rule: Rule = Rule.THRESHOLD,
        value: float = 0.5,
        temperature: float = 0.0,
        softmax_temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: float = 0.0,
        rank_temperature: float = 0.0,
        spread: float = 6.0,
        quotas: list[int] | None = None,
        **fields: int,
    ) -> None:
        count, first = len(masks), 5
        width = first + max([*masks, 1]) + 4
        self.tokens = (
            torch.randint(10, vocab, (count, width)) if vocab > 11 else torch.full((count, width), 8)
        )
        self.rows = torch.zeros(count, len(Row), dtype=torch.int64)
        positions = []
        for b, n in enumerate(masks):
            where = (torch.randperm(width - first)[:n] + first).sort().values
            self.tokens[b, where] = MASK
            positions.append(where)
            values = {
                "rule": rule,
                "score": Score.PROBABILITY,
                "seed": 11,
                "stream": b,
                "first": first,
                "end": width,
                "step": 4,
                "block_step": 1,
                "masks_left": n,
                "eos_at": -1,
            } | fields
            for name, x in values.items():
                self.rows[b, Row[name.upper()]] = int(x)
        self.positions = torch.cat(positions)
        self.cu_rows = torch.tensor([0, *itertools.accumulate(masks)], dtype=torch.int32)
        self.logits = (torch.randn(sum(masks), vocab) * spread).to(dtype)
        self.step_map = torch.full((count, width), -1, dtype=torch.int32)
        self.confidence = torch.zeros(count, width)
        knobs = [value, temperature, softmax_temperature, top_p, top_k, rank_temperature]
        self.knobs = torch.tensor([knobs] * count)
        # Without `quotas`, the masks and one more are shared by three steps, of which this is the second.
        each = [quotas or [(n + 3) // 3, (n + 2) // 3, (n + 1) // 3] for n in masks]
        self.quotas = torch.tensor(each, dtype=torch.int32)
        self.filtered = bool((self.knobs[:, [Knob.TOP_P, Knob.TOP_K]] != torch.tensor([1.0, 0.0])).any())
        self.eos_ids = torch.tensor([EOS])
        self.mask_id = MASK

    @property
    def args(self) -> tuple:
        return (
            self.logits, self.cu_rows, self.positions, self.tokens, self.step_map, self.confidence,
            self.rows, self.knobs, self.quotas, self.eos_ids, self.mask_id, self.filtered,
        )  # fmt: skip

    def run(self, backend: Backend) -> Batch:
        backend.run("unmask", *self.args)
        return self

    def copy(self) -> Batch:
        twin = object.__new__(Batch)
        twin.__dict__ = copy.deepcopy(self.__dict__)
        return twin

    def with_all_positions(self) -> Batch:
        """The same masks among rows for all positions behind the prompt, whose other logits are NaN."""
        twin = self.copy()
        count, width = self.tokens.shape
        first = int(self.rows[0, Row.FIRST])
        every = width - first
        where = [
            b * every + int(p) - first
            for b, (begin, end) in enumerate(itertools.pairwise(self.cu_rows.tolist()))
            for p in self.positions[begin:end]
        ]
        twin.logits = torch.full((count * every, self.logits.shape[1]), torch.nan, dtype=self.logits.dtype)
        twin.logits[where] = self.logits
        twin.positions = torch.arange(first, width).repeat(count)
        twin.cu_rows = torch.arange(count + 1, dtype=torch.int32) * every
        return twin

    def finite(self) -> Batch:
        """Random numbers where the logits are NaN."""
        self.logits = torch.where(self.logits.isnan(), torch.randn(self.logits.shape), self.logits)
        return self

    def assert_same_bits(self, other: Batch) -> None:
        for name in ("tokens", "step_map", "confidence", "rows"):
            assert torch.equal(getattr(self, name), getattr(other, name)), name

    def assert_same(self, other: Batch, atol: float = 1e-7) -> None:
        for name in ("tokens", "step_map", "rows"):
            assert torch.equal(getattr(self, name), getattr(other, name)), name
        torch.testing.assert_close(self.confidence, other.confidence, rtol=1e-5, atol=atol)


RULES: list[Any] = [
    (Rule.QUOTA, 0.0),
    (Rule.THRESHOLD, 0.5),
    (Rule.FACTOR, 1.0),
    (Rule.FACTOR, 0.3),
    (Rule.FRECHET, 1.3),
]


@each_compiled
@pytest.mark.parametrize("rule, value", RULES)
@pytest.mark.parametrize("vocab", [11, 79, 1000, 4097, 8191, 8192, 8193, 16389, 32003])
def test_against_reference(backend: Backend, rule: Rule, value: float, vocab: int) -> None:
    for dtype in backend.dtypes:
        masks = [5, 1, 0, 3] if backend.name == "simt" else [32, 1, 0, 9]
        batch = Batch(masks, vocab=vocab, dtype=dtype, rule=rule, value=value)
        truth = batch.copy().run(Backend("reference"))
        batch.run(backend).assert_same(truth)
        assert (batch.step_map == 4).sum() > 0


@each_compiled
@pytest.mark.parametrize("masks", [1, 31, 33, 300, 1500])
def test_many_masks(backend: Backend, masks: int) -> None:
    for rule, value, rank_temperature in [
        *((*rule, 0.0) for rule in RULES if rule[1] != 0.3),
        (Rule.QUOTA, 0.0, 0.5),
    ]:
        batch = Batch([masks], vocab=100, rule=rule, value=value, rank_temperature=rank_temperature)
        truth = batch.copy().run(Backend("reference"))
        batch.run(backend).assert_same(truth)


@each_compiled
def test_confidence_is_close_to_float64(backend: Backend) -> None:
    batch = Batch([64], vocab=126464, value=1e-30)
    truth = batch.logits.double().softmax(1)
    batch.run(backend)
    where = batch.positions
    exact = truth.gather(1, batch.tokens[0, where][:, None])[:, 0]
    assert ((batch.confidence[0, where] - exact).abs() / exact).max() < 3e-6


@each_backend
def test_mask_token_is_never_a_candidate(backend: Backend) -> None:
    batch = Batch([6])
    batch.logits[:, MASK] = 50.0
    batch.run(backend)
    assert int(batch.rows[0, Row.MASKS_LEFT]) == 5, "confidence is tiny: the normaliser includes the mask"
    assert (batch.tokens[0] == MASK).sum() == 5
    assert float(batch.confidence.max()) < 1e-6


@each_backend
def test_ties_go_to_the_lowest(backend: Backend) -> None:
    batch = Batch([5], vocab=2000, rule=Rule.QUOTA, quotas=[5, 2])
    batch.logits.fill_(0.25)
    batch.run(backend)
    chosen = batch.positions[:2]
    assert (batch.tokens[0, chosen] == 0).all(), "lowest token"
    assert batch.step_map[0].nonzero().numel() == batch.step_map.numel()
    assert (batch.step_map[0] == 4).nonzero()[:, 0].tolist() == chosen.tolist(), "lowest positions"


@each_backend
@pytest.mark.parametrize(
    "masks, quotas, wanted",
    [
        (10, [3, 1, 4, 2], [3, 1, 4, 2]),
        (3, [1, 1, 1, 0, 0], [1, 1, 1]),
        (7, [7], [7]),
        (9, [5, 8], [5, 4]),
        (9, [1, 3], [1, 3, 3, 2]),
        (5, [0, 2, -3], [1, 2, 1, 1]),
        (5, [2**31 - 1], [5]),
    ],
)
def test_quotas_of_the_steps(backend: Backend, masks: int, quotas: list[int], wanted: list[int]) -> None:
    """One or more; the last of them for all steps behind."""
    batch = Batch([masks], rule=Rule.QUOTA, quotas=quotas, block_step=0)
    found = []
    while left := int(batch.rows[0, Row.MASKS_LEFT]):
        keep = (batch.tokens[0, batch.positions] == MASK).nonzero()[:, 0]
        batch.logits, batch.positions = batch.logits[keep].contiguous(), batch.positions[keep]
        batch.cu_rows = torch.tensor([0, left], dtype=torch.int32)
        batch.run(backend)
        found.append(left - int(batch.rows[0, Row.MASKS_LEFT]))
    assert found == wanted


def _batch_with_probabilities(probabilities: list[float], **kwargs: Any) -> Batch:
    """Row i gives token 20 + i the wanted probability, the rest evenly to 79 others."""
    batch = Batch([len(probabilities)], vocab=80, **kwargs)
    for i, p in enumerate(probabilities):
        batch.logits[i] = torch.log(torch.tensor((1 - p) / 79))
        batch.logits[i, 20 + i] = torch.log(torch.tensor(p))
    return batch


@each_backend
@pytest.mark.parametrize(
    "value, wanted",
    [(1.0, 4), (0.11, 2), (0.02, 1), (0.0001, 1), (1.49, 4), (1.6, 5), (10.0, 6)],
)
def test_factor_is_theorem_1(backend: Backend, value: float, wanted: int) -> None:
    """(n + 1)(1 - c): .02 (n 1), .09 (2), .4 (3), .75 (4), 1.5 (5), 4.9 (6), in sorted order."""
    batch = _batch_with_probabilities([0.75, 0.3, 0.85, 0.99, 0.90, 0.97], rule=Rule.FACTOR, value=value)
    batch.run(backend)
    assert 6 - int(batch.rows[0, Row.MASKS_LEFT]) == wanted


@each_backend
def test_threshold(backend: Backend) -> None:
    batch = _batch_with_probabilities([0.5, 0.91, 0.2, 0.95], value=0.9)
    batch.run(backend)
    assert (batch.step_map[0, batch.positions] == 4).tolist() == [False, True, False, True]
    batch = _batch_with_probabilities([0.5, 0.6, 0.2], value=0.9)
    batch.run(backend)
    assert (batch.step_map[0, batch.positions] == 4).tolist() == [False, True, False]


@each_backend
@pytest.mark.parametrize(
    "rule, value, wanted",
    [(Rule.THRESHOLD, 0.5, 4), (Rule.THRESHOLD, 0.50001, 1), (Rule.FACTOR, 1.5, 2), (Rule.FACTOR, 1.49, 1)],
)
def test_bounds_are_inclusive(backend: Backend, rule: Rule, value: float, wanted: int) -> None:
    """Two equal logits, all others -inf: a confidence of exactly 1/2, so (n + 1) / 2 <= factor."""
    batch = Batch([4], vocab=80, rule=rule, value=value)
    batch.logits.fill_(-torch.inf)
    batch.logits[:, 20:22] = 1.0
    batch.run(backend)
    assert 4 - int(batch.rows[0, Row.MASKS_LEFT]) == wanted
    assert (batch.confidence[batch.step_map == 4] == 0.5).all()


@each_backend
def test_end_of_sequence(backend: Backend) -> None:
    def finish(tokens: list[int], eos: list[int], behind: Sequence[int] = ()) -> int:
        batch = Batch([1], vocab=80, value=1.0)
        batch.tokens = torch.tensor([[EOS, 20, *tokens, *behind]])
        batch.step_map = torch.full_like(batch.tokens, -1, dtype=torch.int32)
        batch.confidence = torch.zeros(batch.tokens.shape)
        batch.rows[0, Row.FIRST], batch.rows[0, Row.END] = 2, 2 + len(tokens)
        batch.positions = torch.tensor([2 + tokens.index(MASK)])
        batch.logits[0] = 0.0
        batch.logits[0, 20] = 9.0
        batch.eos_ids = torch.tensor(eos, dtype=torch.int64)
        batch.run(backend)
        return int(batch.rows[0, Row.EOS_AT])

    assert finish([20, MASK, EOS, 20], [EOS]) == 4, "everything before it is committed now"
    assert finish([MASK, MASK, EOS, 20], [EOS]) == -1, "a mask before it"
    assert finish([20, MASK, 20, 20], [EOS]) == -1, "the prompt's EOS does not count"
    assert finish([21, MASK, EOS, 21], [EOS, 21]) == 2, "several ids: the first"
    assert finish([20, MASK, EOS, 20], []) == -1, "no ids"
    assert finish([20] * 700 + [MASK] + [20] * 400 + [EOS, 20, EOS], [EOS]) == 2 + 1101, "a long answer"
    assert finish([20, MASK, 20], [EOS], behind=[EOS]) == -1, "what lies behind the answer does not count"


@each_backend
def test_sequences_without_logits_are_left_alone(backend: Backend) -> None:
    batch = Batch([3, 0, 2])
    before = batch.copy()
    batch.run(backend)
    for name in ("tokens", "step_map", "confidence", "rows"):
        assert torch.equal(getattr(batch, name)[1], getattr(before, name)[1])
    assert int(batch.rows[0, Row.STEP]) == 5
    assert int(batch.rows[0, Row.BLOCK_STEP]) == 2


# --------------------------------------------------------------------------------------------------
# Rules that add up what the ranks before cost
# --------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize(
    "value, wanted", [(0.001, 1), (0.06, 1), (0.08, 2), (0.23, 2), (0.25, 3), (0.45, 4), (1.9, 5), (1e30, 6)]
)
def test_frechet_bounds_the_prefix(backend: Backend, value: float, wanted: int) -> None:
    """1 - c: .01, .03, .1, .15, .25, .7, summed with the last one twice .02, .07, .24, .44, .79, 1.94."""
    batch = _batch_with_probabilities([0.75, 0.3, 0.85, 0.99, 0.90, 0.97], rule=Rule.FRECHET, value=value)
    batch.run(backend)
    assert 6 - int(batch.rows[0, Row.MASKS_LEFT]) == wanted


@each_backend
@pytest.mark.parametrize("value, wanted", [(1.0, 1), (1.5, 2), (1.4999, 1), (2.0, 3), (3.5, 6), (3.4999, 5)])
def test_frechet_of_equal_confidences_is_factor(backend: Backend, value: float, wanted: int) -> None:
    """Of exactly 1/2: (n + 1) / 2 <= value, the bound included."""
    for rule in (Rule.FRECHET, Rule.FACTOR):
        batch = Batch([6], vocab=80, rule=rule, value=value)
        batch.logits.fill_(-torch.inf)
        batch.logits[:, 20:22] = 1.0
        batch.run(backend)
        assert 6 - int(batch.rows[0, Row.MASKS_LEFT]) == wanted


@each_backend
@pytest.mark.parametrize(
    "value, wanted", [(1e-6, 2), (0.69, 2), (0.7, 3), (1.7, 3), (1.8, 4), (3.1, 4), (3.2, 5), (1e30, 5)]
)
def test_entropy_bound_leaves_out_the_largest(backend: Backend, value: float, wanted: int) -> None:
    """Uniform over 1, 2, 3, 4 and 8 tokens: the sum of all but the last is 0, 0, .69, 1.79, 3.18."""
    batch = Batch([5], vocab=80, rule=Rule.ENTROPY_BOUND, score=Score.ENTROPY, value=value)
    batch.logits.fill_(-torch.inf)
    for i, tokens in enumerate([8, 1, 2, 3, 4]):
        batch.logits[i, 20 : 20 + tokens] = 1.0
    batch.run(backend)
    assert 5 - int(batch.rows[0, Row.MASKS_LEFT]) == wanted
    committed = (batch.step_map[0, batch.positions] == 4).tolist()
    assert committed == [wanted == 5, *(rank < wanted for rank in range(4))]


@each_compiled
@pytest.mark.parametrize("rank_temperature", [0.0, 0.5])
def test_costs_against_reference(backend: Backend, rank_temperature: float) -> None:
    """With noise, which the costs do not have, the ranks are no order of cost."""
    for (rule, score), dtype in itertools.product(
        [
            (Rule.FRECHET, Score.PROBABILITY),
            (Rule.FRECHET, Score.MARGIN),
            (Rule.ENTROPY_BOUND, Score.ENTROPY),
        ],
        backend.dtypes,
    ):
        for vocab, masks, value in [(79, [20, 1, 0, 9], 2.0), (8193, [3, 2], 0.6)]:
            batch = Batch(masks, vocab=vocab, dtype=dtype, rule=rule, score=score, value=value,
                          rank_temperature=rank_temperature)  # fmt: skip
            truth = batch.copy().run(Backend("reference"))
            batch.run(backend).assert_same(truth, atol=1e-6)
            assert 0 < int((batch.step_map == 4).sum()) < sum(masks)


# --------------------------------------------------------------------------------------------------
# Rows of logits whose position holds no mask
# --------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize(
    "setting",
    [
        {"value": 0.01},
        {"rule": Rule.QUOTA},
        {"rule": Rule.FACTOR, "value": 1.0, "temperature": 0.8},
        {"rule": Rule.QUOTA, "rank_temperature": 0.5, "score": Score.MARGIN},
        {"value": -2.0, "score": Score.ENTROPY, "top_p": 0.9, "top_k": 50},
        {"rule": Rule.FRECHET, "value": 1.5},
        {"rule": Rule.ENTROPY_BOUND, "value": 3.0, "score": Score.ENTROPY},
    ],
    ids=str,
)
def test_rows_without_a_mask_are_ignored(backend: Backend, setting: dict[str, Any]) -> None:
    """NaN logits there do not matter, and all else has the bits of a call without them."""
    for dtype, masks in itertools.product(backend.dtypes, [[4, 1, 0, 3], [0, 11, 2, 0]]):
        batch = Batch(masks, vocab=8200, dtype=dtype, **setting)
        whole = batch.with_all_positions()
        batch.run(backend)
        whole.run(backend).assert_same_bits(batch)
        assert whole.rows[:, Row.STEP].tolist() == [4 + (n > 0) for n in masks]


@each_backend
def test_bad_logits_of_a_mask_among_ignored_rows(backend: Backend) -> None:
    batch = Batch([3, 2], vocab=80)
    batch.logits[1, 20] = torch.nan
    whole = batch.with_all_positions()
    batch.run(backend)
    whole.run(backend).assert_same_bits(batch)
    assert whole.rows[:, Row.BAD_LOGITS].tolist() == [1, 0]


@each_backend
@pytest.mark.parametrize("top_k", [0, 5])
def test_sequences_without_masks_are_left_alone(backend: Backend, top_k: int) -> None:
    """All of the state, what an earlier call said of bad logits and of the EOS included."""
    batch = Batch([3, 2], vocab=80, top_k=top_k).with_all_positions()
    batch.tokens[0, batch.tokens[0] == MASK] = EOS
    batch.rows[0, Row.BAD_LOGITS], batch.rows[0, Row.EOS_AT] = 2, 9
    before = batch.copy()
    batch.run(backend)
    for name in ("tokens", "step_map", "confidence", "rows"):
        assert torch.equal(getattr(batch, name)[0], getattr(before, name)[0])
    assert int(batch.rows[1, Row.STEP]) == 5
    batch.tokens[1, batch.tokens[1] == MASK] = 20
    before = batch.copy()
    batch.run(backend).assert_same_bits(before)


@each_backend
def test_a_block_is_filled_by_calls_of_one_shape(backend: Backend) -> None:
    """Rows finish at different steps; further calls change nothing."""
    batch = Batch([9, 4, 1], vocab=80, rule=Rule.QUOTA, quotas=[2]).with_all_positions()
    batch.logits = torch.randn(batch.logits.shape)
    for wanted in ([7, 2, 0], [5, 0, 0], [3, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]):
        batch.run(backend)
        assert batch.rows[:, Row.MASKS_LEFT].tolist() == wanted
    assert batch.rows[:, Row.STEP].tolist() == [9, 6, 5]
    assert not (batch.tokens == MASK).any()


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.nan])
@pytest.mark.parametrize("column", [0, MASK, 63, 1023, 1024, 8191, 8192, 8201])
def test_bad_logits_commit_nothing(backend: Backend, value: float, column: int) -> None:
    for dtype, top_k in zip(backend.dtypes * 2, [0, 5] * 3, strict=False):
        batch = Batch([2, 1], vocab=8202, dtype=dtype, top_k=top_k)
        batch.logits[1, column] = value
        before = batch.copy()
        batch.run(backend)
        assert batch.rows[:, Row.BAD_LOGITS].tolist() == [1, 0]
        assert torch.equal(batch.tokens[0], before.tokens[0])
        assert int(batch.rows[0, Row.STEP]) == 4
        assert int(batch.rows[0, Row.MASKS_LEFT]) == 2
        assert int(batch.rows[1, Row.STEP]) == 5, "other sequences go on"


@each_backend
def test_minus_infinity_suppresses_a_token(backend: Backend) -> None:
    batch = Batch([4], value=1e-30)
    best = batch.logits.argmax(1)
    batch.logits[torch.arange(4), best] = -torch.inf
    batch.run(backend)
    assert int(batch.rows[0, Row.BAD_LOGITS]) == 0
    assert (batch.tokens[0, batch.positions] == batch.logits.argmax(1)).all()
    batch = Batch([2])
    batch.logits[1] = -torch.inf
    batch.logits[1, MASK] = 1.0
    assert int(batch.run(backend).rows[0, Row.BAD_LOGITS]) == 1, "no candidate at all"


@each_compiled
def test_sampling_takes_the_reference_noise(backend: Backend) -> None:
    """Same Philox words, so the same candidates, but where two perturbed logits nearly tie."""
    for dtype in backend.dtypes:
        batch = Batch([32, 8], vocab=5000, dtype=dtype, temperature=0.7, value=1e-30, spread=1.0)
        truth = batch.copy().run(Backend("reference"))
        batch.run(backend)
        differ = (batch.tokens != truth.tokens).sum()
        assert differ == 0, f"{differ} of 40 candidates differ"
        torch.testing.assert_close(batch.confidence, truth.confidence, rtol=1e-5, atol=1e-9)


@each_compiled
def test_samples_follow_the_softmax(backend: Backend) -> None:
    """Chi-squared of samples of an 8-token distribution at T = 2, the mask left out."""
    rows = 500 if backend.name == "simt" else 20000
    batch = Batch([rows], vocab=9, temperature=2.0, value=1e-30)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 4.0, 1.5])  # MASK is 7
    batch.logits = logits.repeat(rows, 1)
    batch.run(backend)
    counts = torch.bincount(batch.tokens[0, batch.positions], minlength=9).double()
    expected = (logits.double() / 2).masked_fill(torch.arange(9) == MASK, -torch.inf).softmax(0) * rows
    assert counts[MASK] == 0
    keep = torch.arange(9) != MASK
    chi2 = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi2 < 24.3, "0.1% of draws of chi-squared with 7 degrees of freedom lie above"


@each_compiled
def test_random_remasking(backend: Backend) -> None:
    batch = Batch([16], rule=Rule.QUOTA, quotas=[1, 4], score=Score.RANDOM)
    truth = batch.copy().run(Backend("reference"))
    batch.run(backend).assert_same(truth)
    assert torch.equal(batch.tokens[0, batch.positions[0]], truth.tokens[0, batch.positions[0]])
    other = batch.copy()
    other.rows[0, Row.SEED] = 12
    assert not torch.equal(other.run(backend).step_map, batch.step_map)


@each_compiled
def test_bits_do_not_depend_on_the_batch(backend: Backend) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"score": Score.ENTROPY, "value": -2.0},
        {"score": Score.MARGIN, "top_p": 0.8, "top_k": 50, "softmax_temperature": 0.7},
        {"rule": Rule.QUOTA, "rank_temperature": 0.5},
        {"rule": Rule.FRECHET, "value": 1.5},
        {"rule": Rule.ENTROPY_BOUND, "value": 3.0, "score": Score.ENTROPY},
    ]
    for setting in settings:
        batch = Batch([2, 12, 1], vocab=8200, **({"value": 0.01} | setting))
        alone = batch.copy()
        twice = batch.copy().run(backend)
        batch.run(backend)
        for name in ("tokens", "step_map", "confidence", "rows"):
            assert torch.equal(getattr(batch, name), getattr(twice, name))
        alone.logits, alone.positions = alone.logits[2:14].contiguous(), alone.positions[2:14]
        alone.cu_rows = torch.tensor([0, 12], dtype=torch.int32)
        for name in ("tokens", "step_map", "confidence", "rows", "knobs", "quotas"):
            setattr(alone, name, getattr(alone, name)[1:2].contiguous())
        alone.run(backend)
        for name in ("tokens", "step_map", "confidence", "rows"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[1])


@each_compiled
@pytest.mark.parametrize("vocab, stride", [(500, 517), (500, 520), (504, 520), (8192, 8208), (8193, 8208)])
@pytest.mark.parametrize("top_k", [0, 5])
def test_strided_logits(backend: Backend, vocab: int, stride: int, top_k: int) -> None:
    """NaN behind the rows, aligned for vectors or not; the mask may lie there as well."""
    for dtype, mask_id in itertools.product(backend.dtypes, [MASK, vocab]):
        batch = Batch([2], vocab=vocab, dtype=dtype, value=0.01, top_k=top_k)
        batch.mask_id = mask_id
        batch.tokens[batch.tokens == MASK] = mask_id
        wide = torch.full((2, stride), torch.nan, dtype=dtype)
        wide[:, :vocab] = batch.logits
        truth = batch.copy().run(Backend("reference"))
        batch.logits = wide[:, :vocab]
        batch.run(backend).assert_same(truth)


# --------------------------------------------------------------------------------------------------
# Ranks with noise
# --------------------------------------------------------------------------------------------------


@each_compiled
@pytest.mark.parametrize("rule, value", RULES)
@pytest.mark.parametrize("score", Score)
def test_noisy_ranks_against_reference(backend: Backend, rule: Rule, value: float, score: Score) -> None:
    """The noise is the reference's, so the ranks are, but where two keys nearly tie."""
    value = -1.0 if (rule, score) == (Rule.THRESHOLD, Score.ENTROPY) else value
    for vocab, masks in [(100, [50, 1, 0, 17]), (8197, [4, 2])]:
        for rank_temperature in (0.1, 3.0):
            batch = Batch(masks, vocab=vocab, rule=rule, value=value, score=score, spread=2.0,
                          rank_temperature=rank_temperature)  # fmt: skip
            truth = batch.copy().run(Backend("reference"))
            batch.run(backend).assert_same(truth, atol=1e-6 if score == Score.ENTROPY else 1e-7)


@each_compiled
def test_noisy_ranks_sample_without_replacement(backend: Backend) -> None:
    """Which 2 of 4 positions are drawn, in many sequences of equal scores, each with noise of its own."""
    count, rank_temperature = (250 if backend.name == "simt" else 10000), 0.4
    scores = [0.9, 0.2, 0.5, 0.7]
    batch = Batch([4] * count, vocab=80, rule=Rule.QUOTA, quotas=[2],
                  rank_temperature=rank_temperature)  # fmt: skip
    batch.logits = _batch_with_probabilities(scores).logits.repeat(count, 1)
    batch.run(backend)
    drawn = (batch.step_map.gather(1, batch.positions.view(count, 4)) == 4).tolist()
    p = (torch.tensor(scores).double() / rank_temperature).softmax(0).tolist()
    for i, j in itertools.combinations(range(4), 2):
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        found = drawn.count([k in (i, j) for k in range(4)])
        deviation = math.sqrt(count * expected * (1 - expected))  # of a binomial distribution
        assert abs(found - count * expected) < 4 * deviation, "6 in 100000 lie outside"


@each_backend
def test_noisy_ranks_at_small_temperature(backend: Backend) -> None:
    """Differences of the scores, 1e-20 or more, become 1e10 or more, and noise is below 23: no rank moves."""
    plain = Batch([40, 3], vocab=100, rule=Rule.QUOTA, spread=1.0)
    noisy, other = plain.copy(), plain.copy()
    noisy.knobs[:, Knob.RANK_TEMPERATURE], other.knobs[:, Knob.RANK_TEMPERATURE] = 2.0**-100, 1.0
    plain.run(backend)
    noisy.run(backend).assert_same(plain, atol=0)
    assert not torch.equal(other.run(backend).step_map, plain.step_map), "a temperature that does move ranks"


@each_backend
def test_noise_of_ranks_is_not_stored(backend: Backend) -> None:
    noisy = Batch([30], vocab=100, rule=Rule.QUOTA, temperature=0.7, rank_temperature=1.0)
    every = noisy.copy()
    every.rows[0, Row.RULE], every.knobs[0, Knob.VALUE] = Rule.THRESHOLD, 0.0
    every.knobs[0, Knob.RANK_TEMPERATURE] = 0.0
    assert int(every.run(backend).rows[0, Row.MASKS_LEFT]) == 0
    committed = noisy.run(backend).step_map == 4
    assert committed.sum() == 10
    assert torch.equal(noisy.confidence[committed], every.confidence[committed])
    assert torch.equal(noisy.tokens[committed], every.tokens[committed])
    assert (noisy.confidence[~committed] == 0).all()


@each_backend
def test_noisy_ranks_of_the_other_rules(backend: Backend) -> None:
    """They compare the score without noise; the first by rank comes with it."""
    count, rank_temperature = 40, 1.0
    scores = [0.5, 0.75, 0.875, 0.25]
    firsts = set()
    for rule, value in [(Rule.THRESHOLD, 0.7), (Rule.FACTOR, 0.0)]:
        batch = Batch([4] * count, vocab=80, rule=rule, value=value, rank_temperature=rank_temperature)
        batch.logits = _batch_with_probabilities(scores).logits.repeat(count, 1)
        batch.run(backend)
        for row in (batch.step_map.gather(1, batch.positions.view(count, 4)) == 4).tolist():
            chosen = {i for i, is_chosen in enumerate(row) if is_chosen}
            if rule == Rule.THRESHOLD:
                assert {1, 2} <= chosen
                chosen -= {1, 2}
            else:
                assert len(chosen) == 1
            assert len(chosen) <= 1
            firsts |= {(rule, i) for i in chosen}
    assert firsts == {(Rule.THRESHOLD, i) for i in (0, 3)} | {(Rule.FACTOR, i) for i in range(4)}


@each_backend
def test_noise_of_ranks_is_its_row_s_own(backend: Backend) -> None:
    """Six sequences with the same logits and positions."""
    batch = Batch([40] * 6, vocab=100, rule=Rule.QUOTA, spread=1.0, stream=5, rank_temperature=1.0)
    batch.logits, batch.positions = batch.logits[:40].repeat(6, 1), batch.positions[:40].repeat(6)
    batch.tokens = batch.tokens[:1].repeat(6, 1)
    batch.knobs[1, Knob.RANK_TEMPERATURE] = 0.0
    batch.rows[2, Row.STEP] += 1
    batch.rows[3, Row.STREAM] += 1
    batch.rows[4, Row.SEED] += 1
    batch.run(backend)
    drawn = (batch.step_map >= 0).tolist()
    assert [sum(row) for row in drawn] == [14] * 6
    assert drawn[0] == drawn[5]
    assert all(a != b for a, b in itertools.combinations(drawn[:5], 2))


# --------------------------------------------------------------------------------------------------
# Scores, top-p and top-k
# --------------------------------------------------------------------------------------------------

KEPT: list[dict[str, float]] = [
    {},
    {"softmax_temperature": 0.4},
    {"softmax_temperature": 0.0},
    {"top_p": 0.7},
    {"top_k": 5},
    {"top_p": 0.95, "top_k": 40, "softmax_temperature": 2.5},
]


# Every rule with all tokens kept, and what is kept with one of them.
SCORED: list[Any] = [*itertools.product(Rule, KEPT[:1]), *itertools.product([Rule.THRESHOLD], KEPT[1:])]


@each_compiled
@pytest.mark.parametrize("rule, kept", SCORED, ids=str)
@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.MARGIN, Score.ENTROPY])
def test_scores_against_reference(backend: Backend, rule: Rule, score: Score, kept: dict) -> None:
    value = {Rule.QUOTA: 0.0, Rule.THRESHOLD: -1.0 if score == Score.ENTROPY else 0.4, Rule.FACTOR: 2.0,
             Rule.FRECHET: 2.0, Rule.ENTROPY_BOUND: 1.0}  # fmt: skip
    masks = [2, 0, 1] if backend.name == "simt" else [9, 0, 1]
    for dtype, vocab in itertools.product(backend.dtypes, [11, 1000, 8197]):
        if backend.name == "simt" and vocab == 1000 and kept:
            continue
        spread = 2.0 if vocab == 11 else 4.0
        batch = Batch(masks, vocab=vocab, dtype=dtype, rule=rule, value=value[rule], score=score,
                      spread=spread, **kept)  # fmt: skip
        truth = batch.copy().run(Backend("reference"))
        batch.run(backend).assert_same(truth, atol=1e-6 if score == Score.ENTROPY else 1e-7)
        assert (batch.step_map == 4).sum() > 0


def _row(logits: dict[int, float], rest: float = -torch.inf, **kwargs: Any) -> Batch:
    """One masked position: logits of a few tokens, the others' one, 100 in all; behind them 300."""
    batch = Batch([1], vocab=100, **kwargs)
    batch.logits = torch.full((1, 120), 300.0, dtype=batch.logits.dtype)[:, :100]
    batch.logits.fill_(rest)
    for token, logit in logits.items():
        batch.logits[0, token] = logit
    return batch


def _committed(batch: Batch, backend: Backend) -> tuple[int, float]:
    """The token and confidence of the one position."""
    at = batch.positions[0]
    batch.run(backend)
    return int(batch.tokens[0, at]), float(batch.confidence[0, at])


@each_backend
def test_margin_and_entropy(backend: Backend) -> None:
    halves = {20: 1.0, 30: 1.0}
    assert _committed(_row(halves, score=Score.MARGIN), backend) == (20, 0.0)
    token, entropy = _committed(_row(halves, score=Score.ENTROPY), backend)
    assert (token, entropy) == (20, pytest.approx(-math.log(2)))
    assert _committed(_row({20: 1.0}, score=Score.MARGIN), backend) == (20, 1.0), "no second candidate"
    assert _committed(_row({20: 1.0}, score=Score.ENTROPY), backend) == (20, 0.0)
    with_mask = {20: 0.0, MASK: 0.0}
    assert _committed(_row(with_mask, score=Score.MARGIN), backend)[1] == 0.5, "the mask is no candidate"
    assert _committed(_row(with_mask, score=Score.ENTROPY), backend)[1] == pytest.approx(-math.log(2))
    batch = Batch([3], vocab=9000, rule=Rule.QUOTA, score=Score.MARGIN, quotas=[2])
    batch.logits.fill_(-torch.inf)
    batch.logits[:, 20], batch.logits[:, 8999] = 3.0, torch.tensor([2.5, -torch.inf, 2.0])
    batch.run(backend)
    assert (batch.step_map[0, batch.positions] == 4).tolist() == [False, True, True]


@each_backend
def test_threshold_on_entropy_is_negative(backend: Backend) -> None:
    batch = Batch([3], vocab=80, score=Score.ENTROPY, value=-0.7)
    batch.logits.fill_(-torch.inf)
    batch.logits[0, 20:24], batch.logits[1, 20:22], batch.logits[2, 20:30] = 0.0, 0.0, 0.0
    batch.run(backend)
    assert (batch.step_map[0, batch.positions] == 4).tolist() == [False, True, False]


@each_backend
def test_softmax_temperature_is_the_confidence_s_alone(backend: Backend) -> None:
    token, confidence = _committed(_row({20: 1.0, 30: 0.0}, softmax_temperature=0.5), backend)
    assert (token, confidence) == (20, pytest.approx(1 / (1 + math.exp(-2.0))))
    assert _committed(_row({20: 1.0, 30: 0.0}, softmax_temperature=0.0), backend)[1] == pytest.approx(
        1 / (1 + math.exp(-1.0))
    ), "0 is taken as 1"


@each_backend
def test_equal_logits_stay_together(backend: Backend) -> None:
    """Confidence is 1 over the number of kept tokens, of 3 zeros and one that is hardly larger."""
    logits = {20: 0.0, 21: 1e-30, 50: -0.0, 99: 0.0}

    def kept(**kwargs: float) -> int:
        token, confidence = _committed(_row(logits, **kwargs), backend)
        assert token == 21
        return round(1 / confidence)

    assert kept(top_k=1) == 1
    assert kept(top_k=2) == 4, "the second ties with the others"
    assert kept(top_k=1000) == 4
    assert kept(top_p=0.25) == 4, "the larger ones have 1/4, and that is not more than top_p"
    assert kept(top_p=0.2499) == 1
    assert kept(top_p=1e-9) == 1, "the best always stays"
    assert kept(top_p=0.3, top_k=1) == 1
    assert kept(top_p=0.2, top_k=2) == 1


@each_backend
def test_top_p_takes_the_softmax_temperature(backend: Backend) -> None:
    logits = {20: 2.0, 21: 1.0, 22: 0.0}  # .67, .24, .09 at 1; .87, .12, .02 at 1/2; .42, .33, .25 at 4

    def kept(temperature: float, **kwargs: float) -> float:
        batch = _row(logits, softmax_temperature=temperature, top_p=0.75, **kwargs)
        return _committed(batch, backend)[1]

    assert kept(0.5) == 1.0
    assert kept(1.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert kept(4.0) == pytest.approx(1 / (1 + math.exp(-0.25) + math.exp(-0.5)))
    assert kept(4.0, top_k=2) == pytest.approx(1 / (1 + math.exp(-0.25))), "both: the stricter one"


@each_backend
def test_filter_tells_neighbours_apart(backend: Backend) -> None:
    for dtype in backend.dtypes:
        batch = _row({20: -2.0, 21: -3.0, 22: -3.0, 23: -80.0}, rest=-100.0, top_k=2, dtype=dtype)
        assert _committed(batch, backend)[1] == pytest.approx(1 / (1 + 2 * math.exp(-1)))
        next_to_one = 1 + torch.finfo(dtype).eps
        for near in ({20: next_to_one, 21: 1.0}, {20: -1.0, 21: -next_to_one}):
            assert _committed(_row(near, top_k=1, dtype=dtype), backend) == (20, 1.0)


@each_backend
@pytest.mark.parametrize("kept", [{"top_k": 1}, {"top_p": 0.1}], ids=str)
def test_mask_alone_would_be_kept(backend: Backend, kept: dict) -> None:
    """Then the floor is the best candidate's logit; and the mask still takes part in the normaliser."""
    token, confidence = _committed(_row({MASK: 3.0, 20: 1.0, 21: 0.0}, **kept), backend)
    assert (token, confidence) == (20, pytest.approx(1 / (1 + math.exp(2.0))))
    token, confidence = _committed(_row({MASK: 0.5, 20: 1.0, 21: 0.0}, **kept), backend)
    assert (token, confidence) == (20, 1.0), "a mask below the floor goes like any token"
    assert _committed(_row({MASK: 1.0, 20: 1.0}, **kept), backend) == (20, 0.5), "one at the floor stays"
    without = _row({20: 1.0, 21: 0.0}, **kept)
    without.mask_id = 100  # no token of the vocabulary
    without.tokens[0, without.positions] = 100
    assert _committed(without, backend) == (20, 1.0)


@each_compiled
def test_filter_that_keeps_all_changes_no_bit(backend: Backend) -> None:
    plain = Batch([5, 2], value=0.01)
    for knob, x in [(Knob.TOP_K, 1000), (Knob.TOP_K, 5000), (Knob.TOP_P, 1.0), (Knob.TOP_P, 0.0)]:
        batch = plain.copy()
        batch.knobs[:, knob], batch.filtered = x, True
        batch.run(backend)
        truth = plain.copy().run(backend)
        assert torch.equal(batch.confidence, truth.confidence)
        assert torch.equal(batch.tokens, truth.tokens)


@each_compiled
def test_rows_have_their_own_filters(backend: Backend) -> None:
    batch = Batch([3, 4, 2, 5], value=0.01, top_p=0.6)
    batch.knobs[1, Knob.TOP_P] = 1.0
    batch.knobs[2, Knob.TOP_P], batch.knobs[2, Knob.TOP_K] = 0.0, 3
    truth = batch.copy().run(Backend("reference"))
    batch.run(backend).assert_same(truth)
    ignored = Batch([3], value=0.01, top_k=1)
    ignored.filtered = False
    truth = ignored.copy().run(Backend("reference"))
    ignored.run(backend).assert_same(truth)
    assert float(ignored.confidence.max()) < 1


@each_compiled
def test_noise_that_is_rounded_away_leaves_the_lowest_token(backend: Backend) -> None:
    batch = Batch([2], vocab=9000, temperature=1.0, value=1e-30)
    batch.logits.fill_(2.0**30)
    batch.run(backend)
    assert batch.tokens[0, batch.positions].tolist() == [0, 0]


@each_compiled
def test_samples_are_of_the_kept_tokens(backend: Backend) -> None:
    for dtype in backend.dtypes:
        batch = Batch([3, 2], vocab=900, dtype=dtype, temperature=3.0, top_k=4, value=1e-30, spread=1.0)
        truth = batch.copy().run(Backend("reference"))
        batch.run(backend).assert_same(truth)
        for b, row in enumerate(batch.cu_rows[:2].tolist()):
            candidates = batch.logits[row].float().clone()
            candidates[MASK] = -torch.inf
            assert int(batch.tokens[b, batch.positions[row]]) in candidates.topk(4).indices


@each_compiled
def test_many_sequences(backend: Backend) -> None:
    masks = [1, 0, 2, 1, 0, 0, 3, *[1] * 9, 0]
    for top_k in (0, 3):
        batch = Batch(masks, vocab=200, value=0.3, top_k=top_k)
        truth = batch.copy().run(Backend("reference"))
        batch.run(backend).assert_same(truth)


@each_backend
def test_rows_of_no_sequence_are_left_out(backend: Backend) -> None:
    if not backend.is_cuda and backend.name != "reference":
        pytest.skip("the CPU kernels' checks refuse them")
    for top_k in (0, 3):
        batch = Batch([2, 3], vocab=200, value=0.3, top_k=top_k)
        truth = batch.copy().run(Backend("reference"))
        batch.logits = torch.cat((batch.logits, torch.full((3, 200), torch.nan)))
        batch.positions = torch.cat((batch.positions, torch.zeros(3, dtype=torch.int64)))
        batch.run(backend).assert_same(truth)


def test_philox_known_answers() -> None:
    """The published test vectors of Philox4x32-10."""

    def words(key: int, counter: list[int]) -> list[str]:
        out = reference.philox(key, torch.tensor([counter[0]]), *counter[1:])
        return [f"{x:08x}" for x in out[0].tolist()]

    assert words(0, [0, 0, 0, 0]) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words(2**64 - 1, [ones] * 4) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("logits", lambda x: x.double(), "logits has an unsupported dtype"),
        ("logits", lambda x: x[:, :1], "logits has 1 columns"),
        ("cu_rows", lambda x: x + 1, "cu_rows runs from 1"),
        ("cu_rows", lambda x: x.long(), "cu_rows has another dtype; takes int32"),
        ("positions", lambda x: x + 100, r"positions\[0\] is 1\d\d; takes 0 to"),
        ("tokens", lambda x: x.int(), "tokens has another dtype; takes int64"),
        ("step_map", lambda x: x[:, :2].contiguous(), "step_map has shape"),
        ("rows", lambda x: x[:, :4].contiguous(), "rows has shape"),
        ("rows", lambda x: x + 1000, r"rows\[0\] has first"),
        (
            "rows",
            lambda x: x - 2 * (torch.arange(len(Row)) == Row.BLOCK_STEP),
            r"rows\[0\] has block_step -1",
        ),
        ("quotas", lambda x: x.long(), "quotas has another dtype; takes int32"),
        ("quotas", lambda x: x[:, :0].contiguous(), "quotas has 0 columns"),
        ("quotas", lambda x: x[:0].contiguous(), r"quotas has shape \[0, 3\]; takes \[1, \*\]"),
        ("knobs", lambda x: x.double(), "knobs has another dtype"),
        ("knobs", lambda x: x[:, :2].contiguous(), r"knobs has shape \[1, 2\]; takes \[1, 6\]"),
    ],
)
def test_bad_arguments(name: str, change, message: str) -> None:
    batch = Batch([4])
    setattr(batch, name, change(getattr(batch, name)))
    with pytest.raises(RuntimeError, match="unmask: .*" + message):
        batch.run(Backend("portable"))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastdllm_ext.unmask.default, Batch([4, 2], value=0.2).args)
    torch.library.opcheck(torch.ops.fastdllm_ext.unmask.default, Batch([4, 2], top_p=0.9).args)
