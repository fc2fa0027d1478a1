"""Credit for tokens that were likeliest before (CreditDecoding, arXiv 2510.06133)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdllm_ext.rules.base import Candidates, TorchRule, number


@dataclass(frozen=True)
class Credit(TorchRule):
    """``threshold``, on logits to which past steps have added: l + alpha · log(1 + credit).

    Of each position, the credit of every token decays by the factor ``beta`` a step, and the likeliest token,
    without M, gets p^gamma more, p being its softmax among all tokens of the model's logits. Then the step is
    judged by the new logits: the candidate, its confidence, which is what is stored, and the rule.

    Costs the block's credit (rows · block · vocabulary · 4 bytes: 16 MB a row of LLaDA at 32), some eight
    passes over the candidates' logits in float32, and CUDA graphs.

    Attributes:
        threshold: of confidence, above 0 and at most 1.
        alpha: weight of the credit, above 0.
        beta: what is left of it after a step, above 0 and at most 1.
        gamma: above 0; below 1 it lifts what is unlikely.
    """

    name: ClassVar[str] = "credit"
    kept: ClassVar[int] = 4
    scratch: ClassVar[int] = 12  # the logits without M, and the credit before and after its decay
    threshold: float = number(0.9, "above 0 and at most 1", 0, 1)
    alpha: float = number(0.7, "above 0", 0)
    beta: float = number(0.8, "above 0 and at most 1", 0, 1)
    gamma: float = number(0.2, "above 0", 0)

    @property
    def value(self) -> float:
        """The threshold."""
        return self.threshold

    def fused(self, step: Candidates) -> Tensor:
        """The logits and their credit, in float32."""
        at = step.rows, step.slots
        logits = step.logits.float()
        allowed = logits.clone()
        allowed[:, step.mask_id : step.mask_id + 1] = -math.inf
        likeliest = allowed.argmax(-1, keepdim=True)
        p = (logits.gather(1, likeliest) - logits.logsumexp(-1, keepdim=True)).exp()
        kept = step.memory("credit", logits.shape[1:])
        credit = (kept[at] * self.beta).scatter_add_(1, likeliest, p**self.gamma)
        kept[at] = credit
        return credit.log1p_().mul_(self.alpha).add_(logits)
