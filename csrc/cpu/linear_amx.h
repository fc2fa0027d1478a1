// The bfloat16 inner loop of linear on the tile unit: C[16][16] += A[16][32] B[32][16] an instruction, B as
// 16 rows of 16 pairs.
//
//   sums [row of the weight][row of x] = weight (A: as it lies)  x^T (B: packed once a call)
//
// Two bands by two strips of 16 rows of x are four accumulators. Tails of k and of n go through a copy with
// zeros. The next item is asked for while this one is multiplied, line by line in the order of memory.
#pragma once

#include "cpu/linear.h"
#include "cpu/tiles.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {
namespace amx {

constexpr int kTileDepth = 32; // elements of k that an instruction sums over

struct Pairs {
  using Element = BFloat16;
  static constexpr int kDepth = 2;
  static U32 words(const BFloat16* p, int64_t left) { return load_pairs(p, left); }
};

// Rows of the weight, `stride` apart: a band of an item, or the copy of one.
struct Band {
  const BFloat16* data;
  int64_t stride;
};

// Elements [k, k + columns) of a band with zeros up to a whole number of tiles.
inline Band copy_band(const LinearParams& p, const Item& t, int band, int64_t k, int64_t columns,
                      BFloat16* to) {
  const int64_t stride = round_up(columns, kTileDepth);
  __builtin_memset(to, 0, kBandRows * stride * sizeof(BFloat16));
  for (int64_t i = 0; i < t.rows[band]; ++i)
    __builtin_memcpy(to + i * stride, weight_row<BFloat16>(p, t.first[band] + i) + k,
                     columns * sizeof(BFloat16));
  return {to, stride};
}

// Lines of a part of the next item's band, in the order of memory.
class Ahead {
public:
  Ahead(const LinearParams& p, int64_t first, int64_t k, int64_t columns)
      : row_((const char*)(weight_row<BFloat16>(p, first) + k)), line_(row_),
        row_bytes_(p.weight_stride * sizeof(BFloat16)), row_lines_(columns / kTileDepth), left_(row_lines_) {}

  void fetch() {
    constexpr int kLines = 8;
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i)
      __builtin_prefetch(line_ + i * 64, 0, 2);
    line_ += kLines * 64;
    left_ -= kLines;
    if (left_ <= 0) {
      line_ = row_ += row_bytes_;
      left_ = row_lines_;
    }
  }

private:
  const char *row_, *line_;
  int64_t row_bytes_, row_lines_, left_;
};

// Adds k elements, a whole number of tiles, to the accumulators. x: strips of x_strip words. The first strips
// of an item ask for the lines of the next.
template <int kStrips, bool kAhead>
inline void accumulate(const Band& first, const Band& second, int64_t k, const Word* x, int64_t x_strip,
                       Ahead& ahead_first, Ahead& ahead_second) {
  const int64_t first_bytes = first.stride * sizeof(BFloat16),
                second_bytes = second.stride * sizeof(BFloat16);
  const auto ahead = [](Ahead& lines) FASTDLLM_INLINE {
    if constexpr (kAhead)
      lines.fetch();
  };
  for (int64_t i = 0; i < k; i += kTileDepth) {
    const Word* x_i = x + i / 2 * kTile;
    _tile_loadd(4, first.data + i, first_bytes);
    _tile_loadd(6, x_i, 64);
    ahead(ahead_first);
    _tile_dpbf16ps(0, 4, 6);
    ahead(ahead_first);
    if constexpr (kStrips == 2) {
      _tile_loadd(7, x_i + x_strip, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, second.data + i, second_bytes);
    ahead(ahead_second);
    _tile_dpbf16ps(2, 5, 6);
    ahead(ahead_second);
    if constexpr (kStrips == 2)
      _tile_dpbf16ps(3, 5, 7);
  }
}

// A part of an item and one or two strips of 16 rows of x.
template <int kStrips, bool kAhead>
void multiply_strips(const LinearParams& p, const Item& t, int64_t k, int64_t columns, const Item& next,
                     int64_t next_k, const Word* x, int64_t x_strip, BFloat16* copies, float* sums,
                     int64_t stride) {
  const int64_t whole = columns / kTileDepth * kTileDepth, rest = columns - whole;
  const int64_t bytes = stride * sizeof(float);
  memory_barrier();
  if (k == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(2, sums + kTile * stride, bytes);
    if constexpr (kStrips == 2) {
      _tile_loadd(1, sums + kTile, bytes);
      _tile_loadd(3, sums + kTile * stride + kTile, bytes);
    }
  }
  Ahead ahead_first(p, next.first[0], next_k, whole), ahead_second(p, next.first[1], next_k, whole);
  const auto add = [&](int64_t from, int64_t n, bool copied) FASTDLLM_INLINE {
    Band bands[2];
    for (int band = 0; band < 2; ++band)
      if (copied || t.rows[band] < kBandRows)
        bands[band] = copy_band(p, t, band, from, n, copies + band * kBandRows * round_up(n, kTileDepth));
      else
        bands[band] = {weight_row<BFloat16>(p, t.first[band]) + from, p.weight_stride};
    memory_barrier();
    accumulate<kStrips, kAhead>(bands[0], bands[1], n, x + from / 2 * kTile, x_strip, ahead_first,
                                ahead_second);
  };
  if (whole)
    add(k, whole, false);
  if (rest)
    add(k + whole, rest, true);
  _tile_stored(0, sums, bytes);
  _tile_stored(2, sums + kTile * stride, bytes);
  if constexpr (kStrips == 2) {
    _tile_stored(1, sums + kTile, bytes);
    _tile_stored(3, sums + kTile * stride + kTile, bytes);
  }
  memory_barrier();
}

inline void linear(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t words = round_up(p.k, kTileDepth) / 2, strip = words * kTile;
  const int64_t strips = (p.rows + kTile - 1) / kTile, stride = strips * kTile;
  Word* x = static_cast<Word*>(scratch(
      (strips * strip + kGroupItems * kItemRows * stride + kItemRows * words) * (int64_t)sizeof(Word)));
  float* sums = (float*)(x + strips * strip);
  BFloat16* copies = (BFloat16*)(sums + kGroupItems * kItemRows * stride);
  for (int64_t s = 0; s < strips; ++s)
    pack_rows<Pairs>(p, s * kTile, kTile, words, x + s * strip);
  const Tiles tiles;
  for_each_part<BFloat16>(
      p, begin, end, 2, sums, stride,
      [&](const Item& t, int64_t k, int64_t columns, const Item& next, int64_t next_k, float* to) {
        for (int64_t s = 0; s < strips; s += 2) {
          const auto multiply_two = s + 1 < strips
                                        ? (s ? multiply_strips<2, false> : multiply_strips<2, true>)
                                        : (s ? multiply_strips<1, false> : multiply_strips<1, true>);
          multiply_two(p, t, k, columns, next, next_k, x + s * strip, strip, copies, to + s * kTile, stride);
        }
      });
}

} // namespace amx
} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
