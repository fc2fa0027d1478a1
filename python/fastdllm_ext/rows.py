"""A row as the host sees it: its blocks, where it stands, and what its next forward computes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.shadows import pages_of_shadows

__all__ = ["Block", "Content", "DecodingRow", "Step", "TimeSteps", "share_evenly", "split_blocks"]


@dataclass(frozen=True)
class Block:
    """Positions [begin, end) that are filled together; the first and the last of them are masks."""

    begin: int
    end: int
    masks: int


@dataclass(frozen=True)
class Step:
    """What one forward of a row computes: the data by which cache modes and refresh policies differ.

    Attributes:
        queries: positions computed, whose keys and values are written.
        visible: positions attended to: [0, visible).
        candidates: where a mask may be filled.
        verified: where a token may be taken back, if the rule does that; they have shadows.
    """

    queries: tuple[int, int]
    visible: int
    candidates: tuple[int, int]
    verified: tuple[int, int] = (0, 0)

    @property
    def is_refresh(self) -> bool:
        """All that is attended to is computed."""
        return self.queries == (0, self.visible)


@dataclass(eq=False)
class Content:
    """What stands in a row, [end] each, while it is in no decoder.

    Attributes:
        tokens: int64.
        step_map: int32, the step that filled each position; -1 where none did.
        confidence: float32.
    """

    tokens: Tensor
    step_map: Tensor
    confidence: Tensor

    @staticmethod
    def of(tokens: Tensor) -> Content:
        """That of a row in which nothing has been filled."""
        return Content(
            tokens,
            torch.full_like(tokens, -1, dtype=torch.int32),
            torch.zeros_like(tokens, dtype=torch.float32),
        )


@dataclass(eq=False)
class DecodingRow:
    """The host's view of one row: where it stands, and where its keys lie.

    Attributes:
        config: how it is decoded.
        seed: (key, stream) of its random numbers.
        first, end: positions of the answer, from the first mask to the end of the row.
        blocks: those that hold masks, from left to right.
        content: what stands in it, while it is in no decoder.
        index: its row in the decoder's tensors.
        sequences: its number in the cache; with guidance, that of its prompt-less twin too; with a rule that
            verifies, that of its shadows' pages.
        like: a row with the same tokens, whose first forward may serve this one as well.
        reused: positions whose keys its first refresh takes from another row, in which the same tokens stand;
            those that it would compute are others.
        block: the block being filled.
        fresh: the next step is the block's first.
        masks_left: masks of the block.
        nfe: forwards taken.
        refreshed_at: forwards taken before the one that all its keys come from, or what became of them since.
        done: finished.
    """

    config: GenerationConfig
    seed: tuple[int, int]
    first: int
    end: int
    blocks: list[Block]
    content: Content | None = None
    index: int = -1
    sequences: tuple[int, ...] = ()
    like: DecodingRow | None = field(default=None, repr=False)
    reused: int = 0
    block: int = 0
    fresh: bool = True
    masks_left: int = 0
    nfe: int = 0
    refreshed_at: int = 0
    done: bool = False

    @staticmethod
    def of(tokens: Tensor, config: GenerationConfig, seed: tuple[int, int], mask_id: int) -> DecodingRow:
        """A row of tokens, 1-D int64, with masks where some are to be generated."""
        masks: list[int] = (tokens == mask_id).nonzero()[:, 0].tolist()
        blocks = split_blocks(masks, config.block_length)
        return DecodingRow(config, seed, masks[0], len(tokens), blocks, Content.of(tokens))

    @property
    def every(self) -> int:
        """Blocks from one refresh to the next."""
        return self.config.refresh if isinstance(self.config.refresh, int) else 1

    def enter_block(self, block: int) -> None:
        """Nothing of the block is filled."""
        self.block, self.fresh, self.masks_left = block, True, self.blocks[block].masks
        if block % self.every == 0:
            self.refreshed_at = self.nfe

    def roll_back(self) -> None:
        """To before the refresh that its keys come from."""
        self.nfe, self.block = self.refreshed_at, self.block - self.block % self.every

    def page_lengths(self, shift: bool, page_size: int) -> list[int]:
        """Lengths of the sequences that it needs in a cache."""
        lengths = [self.end] * (2 if self.config.cfg_scale else 1)
        shadows = pages_of_shadows(self.config, self.end - self.first, shift, page_size)
        return lengths + ([shadows * page_size] if shadows else [])

    def next_step(self, shift: bool) -> Step:
        """The row's next forward (docs/decoding.md has the table)."""
        config, every = self.config, self.every
        block, visible = self.blocks[self.block], self.end
        if config.suffix is not None:
            served = min(self.block - self.block % every + every, len(self.blocks)) - 1
            visible = min(visible, self.blocks[served].end + config.suffix)
        whole = (block.begin, block.end)
        verified = whole if config.selection.verifies and not self.fresh else (0, 0)
        if config.cache == "none":
            return Step((0, visible), visible, whole, verified)
        # Where the logits of a block's first position come from the one before it, which the later steps do
        # not compute, the first step fills that position and no other, for good.
        fills = (block.begin, block.begin + 1) if self.fresh and shift else whole
        if self.fresh and self.block % every == 0:
            return Step((self.reused if self.block == 0 else 0, visible), visible, fills)
        if shift and verified != (0, 0):
            verified = (block.begin + 1, block.end)
        before, after = config.window
        begin = max(0, block.begin - before)
        if self.fresh:  # no refresh: the keys of the block before are those of its masks, and are made anew
            begin = min(begin, self.blocks[self.block - 1].begin)
        end = visible if config.cache == "prefix" else min(visible, block.end + after)
        return Step((begin, end), visible, fills, verified)

    def quotas(self, shift: bool) -> list[int]:
        """How many masks each step of the block fills, by ``steps``, from its first step to its last."""
        begin, end = self.next_step(shift).candidates
        # Where the first step has one candidate, the others share the rest.
        alone = int(end - begin == 1 < self.masks_left)
        times = self.time_steps()
        if times is None:
            steps = max(1, self._steps_of_block() - alone)
            return [1] * alone + share_evenly(self.masks_left - alone, steps)
        quotas: list[int] = []
        left = self.masks_left
        while left > 0:
            quotas.append(times.quota(left, 1 if alone and not quotas else left))
            left -= quotas[-1]
        return quotas

    def time_steps(self) -> TimeSteps | None:
        """Those of the block, from the first on, where the schedule has them."""
        if self.config.schedule == "even":
            return None
        seed, stream = self.seed
        chance = random.Random(f"{seed} {stream} {self.block}")
        independent = self.config.schedule == "independent"
        return TimeSteps(self._steps_of_block(), self.config.eps, chance if independent else None)

    def _steps_of_block(self) -> int:
        share, rest = divmod(self.config.steps or 0, len(self.blocks))
        return max(1, share + (self.block < rest))


class TimeSteps:
    """Dream's time steps 1 = t_0 > t_1 > ... > t_S = eps of a block: how many masks each step fills.

    Step i fills a share 1 - t_(i+1) / t_i of the masks that are left, rounded down, and the last step all
    of them; with ``chance``, each mask with that probability. A step that fills nothing needs no forward.
    """

    def __init__(self, steps: int, eps: float, chance: random.Random | None) -> None:
        times = torch.linspace(1, eps, steps + 1)
        self.shares = 1 - times[1:] / times[:-1]
        self.chance = chance
        self.step = 0

    def quota(self, masks: int, candidates: int) -> int:
        """How many of the masks left the next step fills: at least one, and just one of one candidate."""
        if candidates == 1:
            self.step += 1
            return 1
        while self.step < len(self.shares) - 1:
            share, self.step = self.shares[self.step], self.step + 1
            if self.chance is None:
                count = int(masks * share)  # in float32, as published
            else:
                count = sum(self.chance.random() < float(share) for _ in range(masks))
            if count > 0:
                return count
        return masks


def share_evenly(masks: int, steps: int) -> list[int]:
    """How many masks each step fills, the first ones the remainder; no step fills none."""
    share, rest = divmod(masks, steps)
    return [share + (i < rest) for i in range(min(steps, masks))]


def split_blocks(masks: Sequence[int], block_length: int) -> list[Block]:
    """The blocks of a row from the positions of its masks: runs of ``block_length`` from the first mask on.

    A run without a mask is no block; one that has some is cut to them.
    """
    runs = itertools.groupby(masks, key=lambda position: (position - masks[0]) // block_length)
    found = [list(run) for _, run in runs]
    return [Block(run[0], run[-1] + 1, len(run)) for run in found]
