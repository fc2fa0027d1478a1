// filter: top-p and top-k of unmask (core/params.h), as one number a row: kept is every l_v >= floor.
//
//   logits  [logit_rows, vocab], rows logits_stride apart; float32, bfloat16
//   floor   [logit_rows], -inf for an ignored row and for a sequence that keeps all its tokens
//
// A work item is a row. Its logits become a heap, and come out of it from the largest down, with the
// probability and the number of those so far, until they are too many: vocab + kept log(vocab) steps. Sums
// are in double. A row with a NaN keeps all; score_logits reports it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/select.h"
#include "cpu/kernels.h"

namespace fastdllm::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float to_float(float x) { return x; }
struct BFloat16 {
  uint16_t bits;
};
float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float r;
  __builtin_memcpy(&r, &bits, sizeof r);
  return r;
}

// The least logit that top-p and top-k keep. `heap` holds the row's logits and is used up.
float find_floor(std::vector<float>& heap, const RowKnobs& knobs) {
  const double temperature = softmax_temperature(knobs);
  std::make_heap(heap.begin(), heap.end());
  const double largest = heap.front();
  const auto weight = [=](float l) { return std::exp((l - largest) / temperature); };
  double total = 0;
  for (float l : heap)
    total += weight(l);
  const double most = has_top_p(knobs) ? knobs.top_p * total : std::numeric_limits<double>::infinity();
  const float count = has_top_k(knobs) ? knobs.top_k : kInfinity;

  float floor = heap.front();
  double above = 0; // the weight of all that came out
  for (size_t left = heap.size(); left > 0; --left) {
    const float l = heap.front();
    if (l < floor) { // `above`, and the number out, are those of the larger logits
      if (above > most || static_cast<float>(heap.size() - left) >= count)
        return floor;
      floor = l;
    }
    above += weight(l);
    std::pop_heap(heap.begin(), heap.begin() + static_cast<std::ptrdiff_t>(left));
  }
  return floor;
}

template <class T> void filter_rows(const UnmaskParams& p, int64_t begin, int64_t end) {
  std::vector<float> row(p.vocab);
  int64_t b = 0;
  for (int64_t r = begin; r < end; ++r) {
    while (b < p.sequences && p.cu_rows[b + 1] <= r)
      ++b;
    if (b == p.sequences)
      return;
    p.floor[r] = -kInfinity;
    if (!is_masked(p, b, r) || (!has_top_p(p.knobs[b]) && !has_top_k(p.knobs[b])))
      continue;
    const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
    bool has_nan = false;
    float best = -kInfinity; // of the candidates
    for (int64_t v = 0; v < p.vocab; ++v) {
      row[v] = to_float(logits[v]);
      has_nan |= std::isnan(row[v]);
      if (v != p.mask_id)
        best = std::max(best, row[v]);
    }
    if (!has_nan)
      p.floor[r] = std::min(find_floor(row, p.knobs[b]), best);
  }
}

} // namespace

void filter(const UnmaskParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    filter_rows<float>(p, begin, end);
  else
    filter_rows<BFloat16>(p, begin, end);
}

} // namespace fastdllm::cpu
