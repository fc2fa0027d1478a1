// commit: the second half of unmask. For every sequence with rows of logits, ranks its positions, commits the
// candidates that the rule selects (core/select.h) and advances the sequence's state.
//
//   score, candidate  [logit_rows]         from score_logits
//   tokens, step_map, confidence  [sequences, width], changed at the committed positions
//   rows              [sequences]          step, block_step, masks_left, eos_at, bad_logits
//
// A work item is a sequence. Rows of logits are few (a block): sorting them costs nothing beside the pass
// over the logits. A NaN score at a mask means bad logits; such a sequence only gets their number.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/select.h"
#include "cpu/kernels.h"

namespace fastdllm::cpu {
namespace {

// The first generated position that holds an end-of-sequence id, where no mask comes before it; else -1.
int64_t find_eos(const UnmaskParams& p, const RowState& row, const int64_t* tokens) {
  for (int64_t i = row.first; i < row.end; ++i) {
    if (tokens[i] == p.mask_id)
      return -1;
    if (std::find(p.eos_ids, p.eos_ids + p.eos_count, tokens[i]) != p.eos_ids + p.eos_count)
      return i;
  }
  return -1;
}

} // namespace

void commit(const UnmaskParams& p, int64_t begin, int64_t end) {
  std::vector<int64_t> order;
  std::vector<float> noisy;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.cu_rows[b], count = p.cu_rows[b + 1] - first;
    order.clear();
    for (int64_t i = 0; i < count; ++i)
      if (is_masked(p, b, first + i))
        order.push_back(i);
    if (order.empty())
      continue;
    RowState& row = p.rows[b];
    const RowKnobs& knobs = p.knobs[b];
    const float* score = p.score + first;
    row.bad_logits =
        std::count_if(order.begin(), order.end(), [=](int64_t i) { return std::isnan(score[i]); });
    if (row.bad_logits > 0)
      continue;

    const float* key = score;
    if (has_rank_noise(knobs)) {
      noisy.resize(count);
      for (int64_t i : order)
        noisy[i] = rank_key(row, knobs.rank_temperature, p.positions[first + i], score[i]);
      key = noisy.data();
    }
    std::sort(order.begin(), order.end(),
              [key](int64_t i, int64_t j) { return goes_before(key[i], i, key[j], j); });
    const auto rule = static_cast<Rule>(row.rule);
    const int32_t most = quota(p, b);
    const auto masks = static_cast<int64_t>(order.size());
    int64_t committed = 0, before = 0;
    for (int64_t rank = 0; rank < masks; ++rank) {
      const int64_t i = order[rank], at = b * p.width + p.positions[first + i];
      const bool selected = is_selected(rule, knobs.value, most, rank, before, score[i]);
      if (has_cost(rule))
        before += cost(rule, score[i]);
      if (!selected)
        continue;
      ++committed;
      p.tokens[at] = p.candidate[first + i];
      p.step_map[at] = static_cast<int32_t>(row.step);
      p.confidence[at] = score[i];
    }
    row.masks_left -= committed;
    ++row.step;
    ++row.block_step;
    row.eos_at = find_eos(p, row, p.tokens + b * p.width);
  }
}

} // namespace fastdllm::cpu
