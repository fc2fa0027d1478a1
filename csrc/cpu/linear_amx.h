// The inner loop of linear on the tile unit: C[16][16] += A[16][64 bytes] B[16 words][16] an instruction.
//
//   sums [row of the weight][row of x] = weight (A: as it lies)  x^T (B: packed once a call)
//
// Two bands by two planes, of 16 rows of x each, are four accumulators. Tails of k and of n go through a copy
// with zeros. The next item is asked for while this one is multiplied, line by line in the order of memory.
//
// bfloat16: a plane is a strip of 16 rows of x, two elements a word. int8: a strip is two planes, of the high
// and the low bytes of x (linear_int8.h).
#pragma once

#include "cpu/linear_int8.h"
#include "cpu/tiles.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {
namespace amx {

// What the unit multiplies: tile 4 and 5, the weight's bands, by tile 6 and 7, planes of x.
struct Pairs {
  using Element = BFloat16;
  using Weight = BFloat16;
  static constexpr int kDepth = 2;  // elements of a word
  static constexpr int kPlanes = 1; // of a strip of 16 rows
  static void add_0() { _tile_dpbf16ps(0, 4, 6); }
  static void add_1() { _tile_dpbf16ps(1, 4, 7); }
  static void add_2() { _tile_dpbf16ps(2, 5, 6); }
  static void add_3() { _tile_dpbf16ps(3, 5, 7); }
  static U32 words(const BFloat16* p, int64_t left) { return load_pairs(p, left); }

  struct Strip {};
  static void pack(const LinearParams& p, int64_t first, int64_t words, Word* to, Strip&) {
    pack_rows<Pairs>(p, first, kTile, words, to);
  }
  static void combine(const Strip*, int64_t, float*) {}
};

template <class T> struct Int8 {
  using Element = T;
  using Weight = int8_t;
  using Strip = bytes::Strip;
  static constexpr int kDepth = 4;
  static constexpr int kPlanes = bytes::kPlanes;
  static void add_0() { _tile_dpbssd(0, 4, 6); }
  static void add_1() { _tile_dpbssd(1, 4, 7); }
  static void add_2() { _tile_dpbssd(2, 5, 6); }
  static void add_3() { _tile_dpbssd(3, 5, 7); }

  static void pack(const LinearParams& p, int64_t first, int64_t words, Word* to, Strip& strip) {
    bytes::pack<T>(p, first, words, to, kTile, words * kTile, strip);
  }
  static void combine(const Strip* strips, int64_t stride, float* sums) {
    bytes::combine(strips, 0, stride, sums);
  }
};

// Rows of the weight, `stride` apart: a band of an item, or the copy of one.
template <class Weight> struct Band {
  const Weight* data;
  int64_t stride;
};

constexpr int kTileBytes = 64; // of a row
template <class Unit> constexpr int kTileDepth = kTileBytes / (int)sizeof(typename Unit::Weight);

// Elements [k, k + columns) of a band with zeros up to a whole number of tiles.
template <class Unit>
Band<typename Unit::Weight> copy_band(const LinearParams& p, const Item& t, int band, int64_t k,
                                      int64_t columns, typename Unit::Weight* to) {
  using Weight = typename Unit::Weight;
  const int64_t stride = round_up(columns, kTileDepth<Unit>);
  __builtin_memset(to, 0, kBandRows * stride * sizeof(Weight));
  for (int64_t i = 0; i < t.rows[band]; ++i)
    __builtin_memcpy(to + i * stride, weight_row<Weight>(p, t.first[band] + i) + k, columns * sizeof(Weight));
  return {to, stride};
}

// Lines of a part of the next item's band, in the order of memory.
class Ahead {
public:
  Ahead(const char* row, int64_t row_bytes, int64_t lines)
      : row_(row), line_(row), row_bytes_(row_bytes), row_lines_(lines), left_(lines) {}

  template <int kLines> void fetch() {
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

// Adds k elements, a whole number of tiles, to the accumulators. x: planes of x_plane words. Asks for 4
// kLines lines ahead for every two tiles of the weight, which are 32.
template <class Unit, int kPlanes, int kLines>
inline void accumulate(const Band<typename Unit::Weight>& first, const Band<typename Unit::Weight>& second,
                       int64_t k, const Word* x, int64_t x_plane, Ahead& ahead_first, Ahead& ahead_second) {
  constexpr int64_t kBytes = sizeof(typename Unit::Weight);
  const int64_t first_bytes = first.stride * kBytes, second_bytes = second.stride * kBytes;
  const auto ahead = [](Ahead& lines) FASTDLLM_INLINE { lines.template fetch<kLines>(); };
  for (int64_t i = 0; i < k; i += kTileDepth<Unit>) {
    const Word* x_i = x + i / Unit::kDepth * kTile;
    _tile_loadd(4, first.data + i, first_bytes);
    _tile_loadd(6, x_i, kTileBytes);
    ahead(ahead_first);
    Unit::add_0();
    ahead(ahead_first);
    if constexpr (kPlanes == 2) {
      _tile_loadd(7, x_i + x_plane, kTileBytes);
      Unit::add_1();
    }
    _tile_loadd(5, second.data + i, second_bytes);
    ahead(ahead_second);
    Unit::add_2();
    ahead(ahead_second);
    if constexpr (kPlanes == 2)
      Unit::add_3();
  }
}

// A part of an item and one or two planes of x. Asks for the next item's rows of a band from `ahead_row` on,
// as many of them as kLines lets it.
template <class Unit, int kPlanes, int kLines>
void multiply_planes(const LinearParams& p, const Item& t, int64_t k, int64_t columns, const Item& next,
                     int64_t next_k, const Word* x, int64_t x_plane, typename Unit::Weight* copies,
                     float* sums, int64_t stride, int64_t ahead_row) {
  using Weight = typename Unit::Weight;
  constexpr int kDepth = kTileDepth<Unit>;
  const int64_t whole = columns / kDepth * kDepth, rest = columns - whole;
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
    if constexpr (kPlanes == 2) {
      _tile_loadd(1, sums + kTile, bytes);
      _tile_loadd(3, sums + kTile * stride + kTile, bytes);
    }
  }
  const auto ahead_of = [&](int band) {
    return Ahead((const char*)(weight_row<Weight>(p, next.first[band] + ahead_row) + next_k),
                 p.weight_stride * sizeof(Weight), whole / kDepth);
  };
  Ahead ahead_first = ahead_of(0), ahead_second = ahead_of(1);
  const auto add = [&](int64_t from, int64_t n, bool copied) FASTDLLM_INLINE {
    Band<Weight> bands[2];
    for (int band = 0; band < 2; ++band)
      if (copied || t.rows[band] < kBandRows)
        bands[band] = copy_band<Unit>(p, t, band, from, n, copies + band * kBandRows * round_up(n, kDepth));
      else
        bands[band] = {weight_row<Weight>(p, t.first[band]) + from, p.weight_stride};
    memory_barrier();
    accumulate<Unit, kPlanes, kLines>(bands[0], bands[1], n, x + from / Unit::kDepth * kTile, x_plane,
                                      ahead_first, ahead_second);
  };
  if (whole)
    add(k, whole, false);
  if (rest)
    add(k + whole, rest, true);
  _tile_stored(0, sums, bytes);
  _tile_stored(2, sums + kTile * stride, bytes);
  if constexpr (kPlanes == 2) {
    _tile_stored(1, sums + kTile, bytes);
    _tile_stored(3, sums + kTile * stride + kTile, bytes);
  }
  memory_barrier();
}

template <class Unit> void linear(const LinearParams& p, int64_t begin, int64_t end) {
  using Weight = typename Unit::Weight;
  static constexpr decltype(&multiply_planes<Unit, 1, 0>) kMultiply[2][3] = {
      {multiply_planes<Unit, 1, 0>, multiply_planes<Unit, 1, 4>, multiply_planes<Unit, 1, 8>},
      {multiply_planes<Unit, 2, 0>, multiply_planes<Unit, 2, 4>, multiply_planes<Unit, 2, 8>}};
  const int64_t words = round_up(p.k, kTileDepth<Unit>) / Unit::kDepth, plane = words * kTile;
  const int64_t strips = (p.rows + kTile - 1) / kTile, planes = strips * Unit::kPlanes;
  const int64_t stride = planes * kTile, sum_words = kGroupItems * kItemRows * stride;
  const int64_t copy_words = kItemRows * words, strip_words = words_of<typename Unit::Strip>(strips);
  Word* x = static_cast<Word*>(
      scratch((planes * plane + sum_words + copy_words + strip_words) * (int64_t)sizeof(Word)));
  float* sums = (float*)(x + planes * plane);
  Weight* copies = (Weight*)(sums + sum_words);
  auto* found = (typename Unit::Strip*)(sums + sum_words + copy_words);
  for (int64_t s = 0; s < strips; ++s)
    Unit::pack(p, s * kTile, words, x + s * Unit::kPlanes * plane, found[s]);
  const Tiles tiles;
  for_each_part(
      p, begin, end, Unit::kDepth, sums, stride,
      [&](const Item& t, int64_t k, int64_t columns, const Item& next, int64_t next_k, float* to) {
        for (int64_t s = 0; s < planes; s += 2) {
          // The first two pairs of planes share the lines ahead; a pair alone asks for all of them.
          const int64_t lines = s >= 4 ? 0 : planes > 2 ? 4 : 8;
          kMultiply[s + 1 < planes][lines / 4](p, t, k, columns, next, next_k, x + s * plane, plane, copies,
                                               to + s * kTile, stride, s == 2 ? kBandRows / 2 : 0);
        }
      },
      [&](const Item& t, float* of) {
        Unit::combine(found, stride, of);
        finish<typename Unit::Element>(p, t, of, stride);
      });
}

} // namespace amx
} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
