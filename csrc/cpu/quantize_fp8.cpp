// quantize_fp8: values = x / scale, rounded to e4m3fn (core/fp8.h), scale = max |x| / 448 of every row.
//
// x [rows, k], x_stride between rows; values [rows, k] contiguous; scales [rows].
// A true division: 1 / scale is infinite where the scale is denormal.
//
// Magnitudes are compared as the integers of their bits. Those have the order of the numbers, infinity behind
// them and NaN last, so that neither can get lost.
//
// Bytes: x read and the values written once; the second pass over a row finds it in the cache. Work: an item
// is a row; lanes run over its elements.
#include "core/fp8.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

typedef uint8_t U8 __attribute__((vector_size(kLanes)));

inline I32 magnitude(F32 x) { return bits(x) & broadcast(0x7fffffff); }

inline float largest_lane(I32 magnitudes) {
  int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i)
    largest = magnitudes[i] > largest ? magnitudes[i] : largest;
  float r;
  __builtin_memcpy(&r, &largest, sizeof r);
  return r;
}

// x of 0 to 255, as bytes. g++ 12 converts vectors to bytes lane by lane.
inline U8 to_bytes(I32 x) {
#if defined(__AVX512F__)
  return (U8)_mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)x);
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  const __m128i words = _mm_packus_epi32(low, high), bytes = _mm_packus_epi16(words, words);
  U8 r;
  __builtin_memcpy(&r, &bytes, sizeof r);
  return r;
#else
  return __builtin_convertvector((U32)x, U8);
#endif
}

// fastdllm::to_fp8 of every lane.
inline U8 to_fp8(F32 x) {
  const F32 m = from_bits(magnitude(x)), most = broadcast(kLargestFp8);
  const F32 bounded = select(m > most, most, m);
  const I32 u = bits(bounded), sign = (bits(x) >> 24) & broadcast(0x80);
  const I32 small = bits(bounded + broadcast(0x1p14f)) & broadcast(0x7fffff);
  const I32 other = ((u + 0x7ffff + ((u >> 20) & broadcast(1))) >> 20) - broadcast(120 << 3);
  const I32 code = select(bounded < broadcast(0x1p-6f), small, other) | sign;
  return to_bytes(select(x == x, code, broadcast(0x7f)));
}

template <class T> void quantize(const QuantizeFp8Params& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    uint8_t* values = p.values + row * p.k;
    I32 largest{};
    for (int64_t i = 0; i < p.k; i += kLanes) {
      const I32 m = magnitude(load_up_to(x + i, p.k - i));
      largest = select(m > largest, m, largest);
    }
    p.scales[row] = fp8_scale(largest_lane(largest));
    const F32 scale = broadcast(p.scales[row]);
    for (int64_t i = 0; i < p.k; i += kLanes) {
      const int64_t left = p.k - i;
      const U8 v = to_fp8(load_up_to(x + i, left) / scale);
      if (left < kLanes)
        __builtin_memcpy(values + i, &v, left);
      else
        __builtin_memcpy(values + i, &v, sizeof v);
    }
  }
}

} // namespace

void quantize_fp8(const QuantizeFp8Params& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    quantize<float>(p, begin, end);
  else
    quantize<BFloat16>(p, begin, end);
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
