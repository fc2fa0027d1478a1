// Which masked positions a step commits (Fast-dLLM, Algorithm 1 and Theorem 1).
//
// Positions are ranked from 0 by (key descending, position ascending). With c the score of a position:
//   key        c (rank_temperature R = 0) or c / R + g (R > 0), g the position's own Gumbel noise: then the
//              first n are drawn from softmax(c / R) without replacement (Gumbel top-k; Dream's alg_temp)
// With c that of a rank, without noise:
//   quota      rank < q,  q = quotas[block_step], the last of them in every later step; q >= 1
//   threshold  c >= value
//   factor     (n + 1)(1 - c) <= value,  n = rank + 1
//   frechet    E + 2 (1 - c) <= value,  E the sum of 1 - c over the ranks before
//   entropy bound  H <= value,  H the sum of -c over the ranks before, c being the negative entropy
// and rank 0 always: every rule is a test of one position, given its rank and what the ranks before cost.
// Factor, frechet and entropy bound mean the longest prefix whose last member satisfies the inequality.
// Without noise its left side grows with the rank, in the arithmetic here too, so the members of that prefix
// are just those that satisfy it themselves. Costs are added up as multiples of 2^-32 in 64 bits: exactly,
// and so in any order.
#pragma once

#include <cstdint>

#include "core/gumbel.h"
#include "core/params.h"
#include "core/philox.h"

namespace fastdllm {

// Whether row r of the logits, of sequence b, belongs to a mask; else it is ignored.
FASTDLLM_HD bool is_masked(const UnmaskParams& p, int64_t b, int64_t r) {
  return p.tokens[b * p.width + p.positions[r]] == p.mask_id;
}

// Whether a position of key `a` at index i of its sequence's rows goes before one of key `b` at j. One whose
// key is NaN goes before none.
FASTDLLM_HD bool goes_before(float a, int64_t i, float b, int64_t j) { return a > b || (a == b && i < j); }

// What confidence divides the logits by.
FASTDLLM_HD float softmax_temperature(const RowKnobs& knobs) {
  return knobs.softmax_temperature > 0 ? knobs.softmax_temperature : 1.0f;
}
FASTDLLM_HD bool has_top_p(const RowKnobs& knobs) { return knobs.top_p > 0 && knobs.top_p < 1; }
FASTDLLM_HD bool has_top_k(const RowKnobs& knobs) { return knobs.top_k > 0; }
FASTDLLM_HD bool has_rank_noise(const RowKnobs& knobs) { return knobs.rank_temperature > 0; }

// The key of a position, where its ranks have noise.
FASTDLLM_HD float rank_key(const RowState& row, float rank_temperature, int64_t position, float score) {
  const Philox4 own = philox4x32(static_cast<uint64_t>(row.seed), kNoToken, static_cast<uint32_t>(position),
                                 static_cast<uint32_t>(row.step), static_cast<uint32_t>(row.stream));
  return noisy_logit(score, rank_temperature, gumbel<uint32_t>(static_cast<float>(own.x[1])));
}

// How many masks the next step of sequence b fills where its rule is a quota.
FASTDLLM_HD int32_t quota(const UnmaskParams& p, int64_t b) {
  const int64_t step = p.rows[b].block_step, last = p.quota_steps - 1;
  const int32_t q = p.quotas[b * p.quota_steps + (step < last ? step : last)];
  return q > 1 ? q : 1;
}

// A multiple of 2^-32, rounded towards 0. No score costs more than 2^5, so that sums of 2^26 of them hold.
FASTDLLM_HD int64_t fixed_point(float x) {
  return static_cast<int64_t>((x < 0x1p30f ? x : 0x1p30f) * 0x1p32f);
}

// Whether a position adds to the cost of those that rank behind it, and how much.
FASTDLLM_HD bool has_cost(Rule rule) { return rule == Rule::kFrechet || rule == Rule::kEntropyBound; }
FASTDLLM_HD int64_t cost(Rule rule, float score) {
  return fixed_point(rule == Rule::kFrechet ? 1.0f - score : -score);
}

// `before` is the sum of the costs of all positions of a smaller rank, where the rule has costs.
FASTDLLM_HD bool is_selected(Rule rule, float value, int32_t quota, int64_t rank, int64_t before,
                             float score) {
  if (rank == 0)
    return true;
  switch (rule) {
  case Rule::kQuota:
    return rank < quota;
  case Rule::kThreshold:
    return score >= value;
  case Rule::kFactor:
    return static_cast<float>(rank + 2) * (1.0f - score) <= value;
  case Rule::kFrechet:
    return before + 2 * cost(rule, score) <= fixed_point(value);
  case Rule::kEntropyBound:
    return before <= fixed_point(value);
  }
  return false;
}

} // namespace fastdllm
