// Rows of x as whole numbers of two bytes, for units that multiply bytes by bytes (vpdpbusd, the tile unit):
//
//   x = unit (256 high + low),  unit = largest of the row / kMost,  high and low from -128 to 127
//
// The bytes of 16 rows are two planes, four elements a word. Sums of products with an int8 weight are whole
// numbers and exact: a plane's stays below 2^31 up to k = 2^16. What a result loses is the rounding of x, at
// most half a unit an element; the int8 weight has lost 2^-8.
#pragma once

#include "cpu/linear.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {
namespace bytes {

constexpr int kRows = 16; // of a strip
constexpr int kPlanes = 2;
constexpr float kMost = 127 * 256 + 127;
static_assert(kRows == kLanes);

// What is known of a strip beside its bytes.
struct Strip {
  float units[kRows];              // NaN where something in the row is not finite
  uint32_t totals[kPlanes][kRows]; // of each row's bytes
};

// Rows [first, first + 16) of x as [word][row], words `step` apart, the low plane `plane` words behind the
// high.
template <class T>
void pack(const LinearParams& p, int64_t first, int64_t words, Word* to, int64_t step, int64_t plane,
          Strip& strip) {
  constexpr __mmask16 kAll = 0xffff;
  const int64_t rows = min(p.rows - first, kRows);
  const auto row = [&](int64_t i) { return static_cast<const T*>(p.x) + (first + i) * p.x_stride; };
  F32 inverse[kRows];
  U32 totals[kRows][kPlanes] = {}; // of rows that are not finite they may wrap
  for (int64_t i = 0; i < rows; ++i) {
    F32 most{}, poison{};
    for (int64_t k = 0; k < p.k; k += kLanes) {
      const F32 x = load_up_to(row(i) + k, p.k - k);
      most = max(most, max(x, -x));
      poison += x * F32{}; // NaN where x is infinite or NaN
    }
    const float largest = reduce_max(most);
    inverse[i] = broadcast(largest > 0 ? kMost / largest : 0);
    strip.units[i] = largest / kMost + reduce_add(poison);
  }
  for (int64_t w = 0; w < words; w += kRows) {
    __m512i planes[kPlanes][kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      alignas(64) int8_t block[kPlanes][4 * kLanes] = {};
      for (int64_t j = 0; i < rows && j < 4 * kLanes; j += kLanes) {
        const int64_t left = p.k - (w * 4 + j);
        if (left <= 0)
          break;
        const F32 x = load_up_to(row(i) + w * 4 + j, left) * inverse[i];
        const I32 number = (I32)_mm512_maskz_cvtps_epi32(kAll, (__m512)x);
        const I32 low = (I32)((U32)number << 24) >> 24, high = (number - low) >> 8;
        totals[i][0] += (U32)high;
        totals[i][1] += (U32)low;
        _mm_store_si128((__m128i*)(block[0] + j), _mm512_maskz_cvtepi32_epi8(kAll, (__m512i)high));
        _mm_store_si128((__m128i*)(block[1] + j), _mm512_maskz_cvtepi32_epi8(kAll, (__m512i)low));
      }
      for (int of = 0; of < kPlanes; ++of)
        planes[of][i] = _mm512_load_si512(block[of]);
    }
    for (int of = 0; of < kPlanes; ++of) {
      transpose(planes[of]);
      for (int64_t i = 0; i < min(kRows, words - w); ++i)
        store_words(to + (w + i) * step + of * plane, (U32)planes[of][i]);
    }
  }
  for (int64_t i = 0; i < kRows; ++i)
    for (int of = 0; of < kPlanes; ++of) {
      strip.totals[of][i] = 0;
      for (int lane = 0; i < rows && lane < kLanes; ++lane)
        strip.totals[of][i] += totals[i][of][lane];
    }
  for (int64_t i = rows; i < kRows; ++i)
    strip.units[i] = 0;
}

// sums [kItemRows][stride] of planes side by side -> of strips, in place. `offset`: what every number of the
// weight was multiplied with too many.
inline void combine(const Strip* strips, uint32_t offset, int64_t stride, float* sums) {
  for (int64_t row = 0; row < kItemRows; ++row, sums += stride)
    for (int64_t s = 0; s < stride / (kPlanes * kRows); ++s) {
      const auto total = [&](int of) { // of rows of the weight past the last it is any number
        U32 found;
        __builtin_memcpy(&found, strips[s].totals[of], sizeof found);
        const U32 sum = (U32)load(sums + (s * kPlanes + of) * kRows) - offset * found;
        return __builtin_convertvector((I32)sum, F32);
      };
      const F32 high = total(0), low = total(1);
      store(sums + s * kRows, (high * broadcast(256.0f) + low) * load(strips[s].units));
    }
}

} // namespace bytes
} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
