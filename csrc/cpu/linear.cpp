// out[r, j] = sum_k x[r, k] weight[j, k] + bias[j];  gated: out[r, j] = silu(gate[r, j]) * up[r, j] of the
// two halves of the weight, for few rows r.
//
// x [rows, k], strided rows; weight [n, k] ([2 n, k]), strided rows; bias [n] ([2 n]); out [rows, n]. Sums in
// float32 in the order of k, whatever the rows; rounded after the bias is added.
//
// Bytes: the weight once, x once a thread, out once. What few rows cost is the reading of the weight, so that
// it is read as it lies and nothing of it is packed: x^T is, once a call and thread, which is small.
//
// Work: an item is two bands of kLinearBandRows rows of the weight; gated, one of the gate's and one of the
// up's. Sums are [row of the weight][row of x]: rows of x lie in the lanes, in strips of two vectors, and the
// elements of kUnits rows of the weight are broadcast. They are turned when out is written. Where x does not
// fit in a core's own cache, a group of items goes over a part of k before the next.
//
// Element formats: as in paged_attention.cpp. bfloat16 is widened to float32 kUnits rows at a time, or read
// in pairs as it lies where there is vdpbf16ps. With a tile unit it has an inner loop of its own,
// linear_amx.h.
#include "cpu/linear.h"
#if defined(__AMX_BF16__)
#include "cpu/linear_amx.h"
#endif

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr int kStripRows = 2 * kLanes;
static_assert(kBandRows % kUnits == 0);

// Rows of the weight that are shorter are asked for ahead. The hardware itself follows along longer ones.
constexpr int64_t kPage = 4096; // bytes

// Adds to, or puts, the sums of kUnits rows of the weight, `unit` words apart, and a strip of kN vectors.
// Asks for as many elements of the rows from `next` on, stride `next_stride`, in the order of memory.
template <class Format, int kN, bool kAhead>
void multiply_strip(const Word* weight, int64_t unit, const Word* x, int64_t words,
                    const typename Format::Element* next, int64_t next_stride, bool add, float* sums,
                    int64_t stride) {
  constexpr int kAheadStride =
      kAhead ? 2 * kUnits * Format::kDepth * (int)sizeof(typename Format::Element) : 0;
  F32 sum[kUnits][kN] = {};
  if (add)
    unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
      unroll<kN>([&](auto v) FASTDLLM_INLINE { sum[u][v] = load(sums + u * stride + v * kLanes); });
    });
  const int64_t steps = kAhead ? round_up(words, 2 * kUnits) / kUnits : words; // for each row of the next
  for (int64_t w = 0; w < words; w += steps, next += next_stride)
    multiply<Format, kN, kAheadStride>(sum, weight + w, unit, 1, x + w * kN * kLanes, min(steps, words - w),
                                       (const char*)next);
  unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
    unroll<kN>([&](auto v) FASTDLLM_INLINE { store(sums + u * stride + v * kLanes, sum[u][v]); });
  });
}

// Whether rows of the weight are words as they lie.
template <class Format> bool lies_in_words(const LinearParams& p) {
  if constexpr (Format::kDepth * sizeof(typename Format::Element) != sizeof(Word))
    return false;
  return p.k % Format::kDepth == 0 && p.weight_stride % Format::kDepth == 0 &&
         (uintptr_t)p.weight % sizeof(Word) == 0;
}

template <class Format> void multiply_all(const LinearParams& p, int64_t begin, int64_t end) {
  using Element = typename Format::Element;
  constexpr int kDepth = Format::kDepth;
  const int64_t words = (p.k + kDepth - 1) / kDepth, strip = kStripRows * words;
  const int64_t strips = (p.rows + kStripRows - 1) / kStripRows, stride = round_up(p.rows, kItemRows);
  Word* x = static_cast<Word*>(
      scratch((strips * strip + kGroupItems * kItemRows * stride + kUnits * words) * (int64_t)sizeof(Word)));
  float* sums = (float*)(x + strips * strip);
  Word* copy = (Word*)(sums + kGroupItems * kItemRows * stride);
  const auto is_narrow = [&](int64_t s) { return p.rows - s * kStripRows <= kLanes; };
  for (int64_t s = 0; s < strips; ++s)
    pack_rows<Format>(p, s * kStripRows, is_narrow(s) ? kLanes : kStripRows, words, x + s * strip);
  const bool direct = lies_in_words<Format>(p);
  const bool ask = p.k * (int64_t)sizeof(Element) < kPage;

  const auto multiply_part = [&](const Item& t, int64_t k, int64_t columns, const Item& next, int64_t next_k,
                                 float* to) {
    const int64_t part = (columns + kDepth - 1) / kDepth; // words
    for (int band = 0; band < 2; ++band)
      for (int64_t u = 0; u < t.rows[band]; u += kUnits) {
        const int64_t row = t.first[band] + u, rows = min(t.rows[band] - u, kUnits);
        const Element* ahead = u + kUnits < kBandRows ? weight_row<Element>(p, row + kUnits) + k
                               : band == 0            ? weight_row<Element>(p, t.first[1]) + k
                                                      : weight_row<Element>(p, next.first[0]) + next_k;
        const Word* weight = (const Word*)(weight_row<Element>(p, row) + k);
        int64_t unit = p.weight_stride / kDepth;
        if (!direct || rows < kUnits) {
          weight = copy;
          unit = part;
          if (rows < kUnits || part * kDepth != columns)
            __builtin_memset(copy, 0, kUnits * part * sizeof(Word));
          for (int64_t j = 0; j < rows; ++j)
            Format::pack(weight_row<Element>(p, row + j) + k, copy + j * part, columns);
        }
        for (int64_t s = 0; s < strips; ++s) {
          const auto multiply_one =
              is_narrow(s) ? (s || !ask ? multiply_strip<Format, 1, false> : multiply_strip<Format, 1, true>)
                           : (s || !ask ? multiply_strip<Format, 2, false> : multiply_strip<Format, 2, true>);
          const int64_t width = is_narrow(s) ? kLanes : kStripRows;
          multiply_one(weight, unit, x + s * strip + k / kDepth * width, part, ahead, p.weight_stride, k > 0,
                       to + (band * kBandRows + u) * stride + s * kStripRows, stride);
        }
      }
  };
  for_each_part<Element>(p, begin, end, kDepth, sums, stride, multiply_part);
}

} // namespace

void linear(const LinearParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    return multiply_all<Float32>(p, begin, end);
#if defined(__AMX_BF16__)
  return amx::linear(p, begin, end);
#else
  multiply_all<NarrowFloat>(p, begin, end);
#endif
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
