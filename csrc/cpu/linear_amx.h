// The inner loop of linear on the tile unit: C[16][16] += A[16][64 bytes] B[16 words][16] an instruction.
//
//   sums [row of the weight][row of x] = weight (A: as it lies)  x^T (B: packed once a call)
//
// Two bands by two planes, of 16 rows of x each, are four accumulators. Tails of k and of n go through a copy
// with zeros. The next item is asked for while this one is multiplied, line by line in the order of memory.
//
// bfloat16: a plane is a strip of 16 rows of x, two elements a word.
// int8: the unit multiplies bytes by bytes. A row of x becomes numbers of 16 bits, its largest 32,767 and the
// others in proportion: x = s (256 high + low), and its high and its low bytes are a plane each, four
// elements a word. The sums are whole numbers and exact: |256 high + low| < 2^15 and |w| < 2^7, so that a
// plane's sum stays below 2^31 up to k = 2^16. What a result loses is the rounding of x, at most half of
// 2^-15 of the row's largest an element; the int8 weight has lost 2^-8.
#pragma once

#include "cpu/linear.h"
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

  static void pack(const LinearParams& p, int64_t first, int64_t words, Word* to, float*) {
    pack_rows<Pairs>(p, first, kTile, words, to);
  }
  static void combine(const float*, int64_t, float*) {}
};

template <class T> struct Int8 {
  using Element = T;
  using Weight = int8_t;
  static constexpr int kDepth = 4;
  static constexpr int kPlanes = 2;
  static void add_0() { _tile_dpbssd(0, 4, 6); }
  static void add_1() { _tile_dpbsud(1, 4, 7); }
  static void add_2() { _tile_dpbssd(2, 5, 6); }
  static void add_3() { _tile_dpbsud(3, 5, 7); }

  // Rows [first, first + 16) of x as two planes of [word][row], and what their units are worth. What is not
  // finite makes its row's unit NaN.
  static void pack(const LinearParams& p, int64_t first, int64_t words, Word* to, float* units) {
    constexpr float kMost = 32767;
    constexpr __mmask16 kAll = 0xffff;
    float inverse[kTile] = {};
    for (int64_t i = 0; i < kTile; ++i) {
      units[i] = 0;
      if (first + i >= p.rows)
        continue;
      const T* x = static_cast<const T*>(p.x) + (first + i) * p.x_stride;
      F32 most{}, poison{};
      for (int64_t k = 0; k < p.k; k += kLanes) {
        const F32 y = load_up_to(x + k, p.k - k);
        most = max(most, max(y, -y));
        poison += y * F32{}; // NaN where y is infinite or NaN
      }
      float largest = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        largest = (most[lane] > largest ? most[lane] : largest) + poison[lane];
      units[i] = largest / kMost;
      inverse[i] = largest > 0 ? kMost / largest : 0;
    }
    for (int64_t w = 0; w < words; w += kTile) {
      __m512i high[kTile], low[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        alignas(64) int8_t bytes[2][4 * kLanes];
        const T* x = static_cast<const T*>(p.x) + (first + i) * p.x_stride;
        for (int64_t j = 0; j < 4 * kLanes; j += kLanes) {
          const int64_t left = p.k - (w * kDepth + j);
          __m512i number = _mm512_setzero_si512();
          if (first + i < p.rows && left > 0)
            number = _mm512_maskz_cvtps_epi32(
                kAll, (__m512)(load_up_to(x + w * kDepth + j, left) * broadcast(inverse[i])));
          _mm_store_si128((__m128i*)(bytes[0] + j),
                          _mm512_maskz_cvtepi32_epi8(kAll, (__m512i)((I32)number >> 8)));
          _mm_store_si128((__m128i*)(bytes[1] + j), _mm512_maskz_cvtepi32_epi8(kAll, number));
        }
        high[i] = _mm512_load_si512(bytes[0]);
        low[i] = _mm512_load_si512(bytes[1]);
      }
      transpose(high);
      transpose(low);
      for (int64_t i = 0; i < min(kTile, words - w); ++i) {
        store_words(to + (w + i) * kTile, (U32)high[i]);
        store_words(to + (words + w + i) * kTile, (U32)low[i]);
      }
    }
  }

  // sums [kItemRows][stride] of planes -> of strips, in place.
  static void combine(const float* units, int64_t stride, float* sums) {
    for (int64_t row = 0; row < kItemRows; ++row, sums += stride)
      for (int64_t at = 0; at < stride / kPlanes; at += kTile) {
        const F32 high = __builtin_convertvector((I32)load(sums + at * kPlanes), F32);
        const F32 low = __builtin_convertvector((I32)load(sums + at * kPlanes + kTile), F32);
        store(sums + at, (high * broadcast(256.0f) + low) * load(units + at));
      }
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
  Word* x = static_cast<Word*>(
      scratch((planes * plane + sum_words + kItemRows * words + strips * kTile) * (int64_t)sizeof(Word)));
  float* sums = (float*)(x + planes * plane);
  Weight* copies = (Weight*)(sums + sum_words);
  float* units = (float*)(copies + kItemRows * words * Unit::kDepth);
  for (int64_t s = 0; s < strips; ++s)
    Unit::pack(p, s * kTile, words, x + s * Unit::kPlanes * plane, units + s * kTile);
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
        Unit::combine(units, stride, of);
        finish<typename Unit::Element>(p, t, of, stride);
      });
}

} // namespace amx
} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
