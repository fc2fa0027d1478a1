// What the inner loops of linear share: the work list, the packing of x, and what becomes of the sums.
// For files compiled once for each instruction set, as simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/multiply.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr int kBandRows = (int)kLinearBandRows;
constexpr int kItemRows = 2 * kBandRows;
constexpr int64_t kPartWords = 1 << 15; // of x, that stay in a core's own cache
constexpr int64_t kPartStep = 64;       // elements
constexpr int64_t kGroupItems = 8;

// Two bands of rows of the weight; the second of the last item may be empty.
struct Item {
  int64_t first[2]; // row of the weight
  int64_t rows[2];  // up to kBandRows
  int64_t column;   // of out, that the first band begins at
};

inline Item item_at(const LinearParams& p, int64_t index) {
  Item t;
  t.column = index * (p.gated ? kBandRows : kItemRows);
  t.first[0] = t.column;
  t.first[1] = t.column + (p.gated ? p.n : kBandRows);
  const int64_t left = p.n - t.column;
  t.rows[0] = min(left, kBandRows);
  t.rows[1] = p.gated ? t.rows[0] : max(min(left - kBandRows, kBandRows), 0);
  return t;
}

template <class Element> const Element* weight_row(const LinearParams& p, int64_t row) {
  return static_cast<const Element*>(p.weight) + row * p.weight_stride;
}

template <class T> int64_t words_of(int64_t count) {
  return (count * (int64_t)sizeof(T) + sizeof(Word) - 1) / sizeof(Word);
}

// x[i][j] <-> x[j][i]
inline void transpose(U32 (&x)[kLanes]) {
#if defined(__AVX512F__)
  __m512i y[kLanes];
  unroll<kLanes>([&](auto i) FASTDLLM_INLINE { y[i] = (__m512i)x[i]; });
  transpose(y);
  unroll<kLanes>([&](auto i) FASTDLLM_INLINE { x[i] = (U32)y[i]; });
#else
  Word from[kLanes][kLanes], to[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i)
    store_words(from[i], x[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j)
      to[j][i] = from[i][j];
  for (int i = 0; i < kLanes; ++i)
    x[i] = load_words(to[i]);
#endif
}

// Rows [first, first + width) of x as [word][row], `words` of them, zeros past the last row and element.
template <class Format>
void pack_rows(const LinearParams& p, int64_t first, int64_t width, int64_t words, Word* to) {
  const auto* x = static_cast<const typename Format::Element*>(p.x);
  for (int64_t r = 0; r < width; r += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      const int64_t left = p.k - w * Format::kDepth;
      U32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = first + r + i;
        block[i] =
            row < p.rows && left > 0 ? Format::words(x + row * p.x_stride + w * Format::kDepth, left) : U32{};
      }
      transpose(block);
      for (int64_t i = 0; i < min(kLanes, words - w); ++i)
        store_words(to + (w + i) * width + r, block[i]);
    }
}

// to [16 rows][kBandRows] = from [kBandRows][16 rows of the `stride`]
inline void turn(const float* from, int64_t stride, float* to) {
  for (int i = 0; i < kBandRows; i += kLanes)
    for (int j = 0; j < 16; j += kLanes) {
      U32 block[kLanes];
      for (int u = 0; u < kLanes; ++u)
        block[u] = (U32)load(from + (i + u) * stride + j);
      transpose(block);
      for (int u = 0; u < kLanes; ++u)
        store(to + (j + u) * kBandRows + i, (F32)block[u]);
    }
}

// out from sums [kItemRows][stride] of an item and all rows of x.
template <class T> void finish(const LinearParams& p, const Item& t, const float* sums, int64_t stride) {
  float bias[2][kBandRows] = {}, scales[2][kBandRows] = {};
  for (int band = 0; band < 2; ++band)
    for (int64_t i = 0; i < t.rows[band]; ++i) {
      bias[band][i] = p.bias ? to_float(static_cast<const T*>(p.bias)[t.first[band] + i]) : 0;
      scales[band][i] = p.scales ? p.scales[t.first[band] + i] : 1;
    }
  for (int64_t row = 0; row < p.rows; row += 16) {
    float block[2][16 * kBandRows];
    for (int band = 0; band < 2; ++band)
      turn(sums + band * kBandRows * stride + row, stride, block[band]);
    for (int64_t r = 0; r < min(16, p.rows - row); ++r) {
      T* out = static_cast<T*>(p.out) + (row + r) * p.n + t.column;
      const auto value = [&](int band, int64_t i) {
        return load(block[band] + r * kBandRows + i) * load(scales[band] + i) + load(bias[band] + i);
      };
      if (p.gated)
        for (int64_t i = 0; i < t.rows[0]; i += kLanes)
          store_up_to(out + i, t.rows[0] - i,
                      rounded<T>(silu(rounded<T>(value(0, i)))) * rounded<T>(value(1, i)));
      else
        for (int band = 0; band < 2; ++band)
          for (int64_t i = 0; i < t.rows[band]; i += kLanes)
            store_up_to(out + band * kBandRows + i, t.rows[band] - i, value(band, i));
    }
  }
}

// Calls multiply(item, k, columns, next item, its k, sums) for parts of k of the items [begin, end): adds, or
// where k is 0 puts, the products over elements [k, k + columns) to sums [kItemRows][stride], and after the
// last part of an item end_item(item, sums). Parts are such that x's stays in the cache while a group of
// items goes over it. `depth`: elements of a word of x.
template <class F, class E>
void for_each_part(const LinearParams& p, int64_t begin, int64_t end, int64_t depth, float* sums,
                   int64_t stride, const F& multiply, const E& end_item) {
  const int64_t most = max(kPartWords / stride, kPartStep) * depth, parts = (p.k + most - 1) / most;
  const int64_t part = round_up((p.k + parts - 1) / parts, kPartStep), group = parts > 1 ? kGroupItems : 1;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t stop = min(first + group, end);
    const auto sums_of = [&](int64_t i) { return sums + (i - first) * kItemRows * stride; };
    for (int64_t k = 0; k < p.k; k += part)
      for (int64_t i = first; i < stop; ++i) {
        const bool more = i + 1 < stop, again = k + part < p.k;
        const Item next = item_at(p, more ? i + 1 : again ? first : min(stop, end - 1));
        multiply(item_at(p, i), k, min(part, p.k - k), next, more ? k : again ? k + part : 0, sums_of(i));
      }
    for (int64_t i = first; i < stop; ++i)
      end_item(item_at(p, i), sums_of(i));
  }
}

} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
