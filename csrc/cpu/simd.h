// Vectors of float32 for the instruction set that a file is compiled for (FASTDLLM_ISA names it).
//
// F32 and I32 are GCC vector types: + - * / & | ^ << >> and comparisons work lane by lane, a comparison gives
// an I32 of 0 or -1, and x[i] is a lane. The functions below are what the language has no operator for.
//
// Everything sits in an unnamed namespace, and nothing from the C++ library's templates may be used beside it
// in a file that is compiled several times: the linker keeps one copy of an inline function, and a copy that
// was compiled for AVX-512 must not reach a CPU without it.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef FASTDLLM_ISA
#error "FASTDLLM_ISA must name the instruction set, e.g. -DFASTDLLM_ISA=portable"
#endif

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr __mmask16 kAllLanes = 0xffff; // g++ 12 warns about the unmasked forms of some intrinsics
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t I32 __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t U32 __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t U16 __attribute__((vector_size(kLanes * sizeof(uint16_t))));

typedef uint8_t U8 __attribute__((vector_size(kLanes * sizeof(uint8_t))));

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// e4m3 (core/fp8.h).
struct Fp8 {
  uint8_t bits;
};

// f(Index<0>), f(Index<1>) ... f(Index<kN - 1>). An array that is indexed by these alone becomes registers,
// which is not so for an array indexed by the variable of a loop that the compiler unrolls.
template <int kI> struct Index {
  constexpr operator int() const { return kI; }
};
template <int kN, int kI = 0, class F> [[gnu::always_inline]] inline void unroll(const F& f) {
  if constexpr (kI < kN) {
    f(Index<kI>{});
    unroll<kN, kI + 1>(f);
  }
}

// ---------------------------------------------------------------------------------------------- lane by lane

inline F32 broadcast(float x) { return x - F32{}; }
inline I32 broadcast(int32_t x) { return x - I32{}; }
inline U32 broadcast(uint32_t x) { return x - U32{}; }

// Lane i holds i.
inline I32 iota() {
  I32 r;
  for (int i = 0; i < kLanes; ++i)
    r[i] = i;
  return r;
}

inline I32 bits(F32 x) { return (I32)x; }
inline F32 from_bits(I32 x) { return (F32)x; }

inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
inline I32 select(I32 mask, I32 yes, I32 no) { return mask ? yes : no; }

// a > b ? a : b, thus b where either is NaN: max(x, m) skips a NaN x.
inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, rounded once where the instruction set has it.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// ---------------------------------------------------------------------------------------------- memory

inline F32 load(const float* p) {
  F32 r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}

inline void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }

inline F32 load(const BFloat16* p) {
  U16 r;
  __builtin_memcpy(&r, p, sizeof r);
  return (F32)(__builtin_convertvector(r, U32) << 16);
}

// To nearest, ties to even; a NaN stays one.
inline U32 round_to_bf16(F32 x) {
  const U32 u = (U32)x;
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (U32)select(x == x, (I32)rounded, (I32)((u >> 16) | 0x40u));
}

// What is left of x once it has been stored as T.
template <class T> inline F32 rounded(F32 x) { return x; }
template <> inline F32 rounded<BFloat16>(F32 x) { return (F32)(round_to_bf16(x) << 16); }

inline void store(BFloat16* p, F32 x) {
  const U16 r = __builtin_convertvector(round_to_bf16(x), U16);
  __builtin_memcpy(p, &r, sizeof r);
}

// Exact; NaN becomes 480. What is a half apart from the bias of its exponent, is one times 2^-8.
inline F32 load(const Fp8* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i signs_apart = _mm256_and_si256(halves, _mm256_set1_epi16((int16_t)0xbf80));
  return (F32)_mm512_maskz_cvtph_ps(kAllLanes, signs_apart) * broadcast(256.0f);
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i halves = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  const __m128i signs_apart = _mm_and_si128(halves, _mm_set1_epi16((int16_t)0xbf80));
  return (F32)_mm256_cvtph_ps(signs_apart) * broadcast(256.0f);
#else
  U8 bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  const U32 x = __builtin_convertvector(bytes, U32), magnitude = x & 0x7fu;
  const F32 small = __builtin_convertvector((I32)magnitude, F32) * broadcast(0x1p-9f);
  const F32 normal = (F32)((magnitude << 20) + (120u << 23));
  return (F32)((U32)select((I32)magnitude < 8, small, normal) | x >> 7 << 31);
#endif
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
inline void store(Fp8* p, F32 x) {
  const I32 magnitude = bits(x) & 0x7fffffff;
  const I32 bounded = select(magnitude < 0x43e00000, magnitude, broadcast(0x43e00000)); // 448
  const I32 small = bits(from_bits(bounded) + broadcast(0x1p14f)) & 0x7fffff;
  const I32 normal = ((bounded + 0x7ffff + (bounded >> 20 & 1)) >> 20) - (120 << 3);
  const I32 r = select(from_bits(bounded) < broadcast(0x1p-6f), small, normal) | (bits(x) >> 24 & 0x80);
  const U8 bytes = to_bytes(select(x == x, r, broadcast(0x7f)));
  __builtin_memcpy(p, &bytes, sizeof bytes);
}

// The first n lanes of memory (n <= kLanes), the others `rest`.
template <class T> inline F32 load_first(const T* p, int64_t n, float rest = 0) {
  T head[kLanes] = {};
  __builtin_memcpy(head, p, n * sizeof(T));
  return select(iota() < broadcast((int32_t)n), load(head), broadcast(rest));
}

template <class T> inline void store_first(T* p, int64_t n, F32 x) {
  T head[kLanes];
  store(head, x);
  __builtin_memcpy(p, head, n * sizeof(T));
}

// The same for `left` elements where those are fewer than kLanes, else for kLanes.
template <class T> inline F32 load_up_to(const T* p, int64_t left) {
  return left < kLanes ? load_first(p, left) : load(p);
}
template <class T> inline void store_up_to(T* p, int64_t left, F32 x) {
  if (left < kLanes)
    store_first(p, left, x);
  else
    store(p, x);
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float r;
  __builtin_memcpy(&r, &u, sizeof r);
  return r;
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---------------------------------------------------------------------------------------------- over lanes

inline float reduce_add(F32 x) {
  float r[kLanes];
  store(r, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      r[i] += r[i + width];
  return r[0];
}

// The largest lane; NaN lanes are skipped unless all lanes are NaN.
inline float reduce_max(F32 x) {
  float r[kLanes];
  store(r, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      r[i] = r[i] > r[i + width] || r[i + width] != r[i + width] ? r[i] : r[i + width];
  return r[0];
}

// ---------------------------------------------------------------------------------------------- functions

inline F32 round(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)x, 0);
#elif defined(__AVX2__)
  return (F32)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const F32 shifter = broadcast(12582912.0f); // 1.5 * 2^23: the sum has no fraction bits; |x| < 2^22
  return (x + shifter) - shifter;
#endif
}

// 2^(n + f) for integers n >= -127 and f in [-1/2, 1/2]; zero where x < -126, and x where x is NaN. The
// polynomial is minimax in the relative error among those with p(0) = 1.
template <int kDegree> inline F32 exp2_parts(F32 n, F32 f, F32 x) {
  static_assert(kDegree == 3 || kDegree == 5);
  F32 p;
  if constexpr (kDegree == 5) {
    p = fma(f, broadcast(0x1.5bba14p-10f), broadcast(0x1.3cea88p-7f));
    p = fma(f, p, broadcast(0x1.c6b752p-5f));
    p = fma(f, p, broadcast(0x1.ebf9bcp-3f));
    p = fma(f, p, broadcast(0x1.62e42ap-1f));
  } else {
    p = fma(f, broadcast(0x1.c2a218p-5f), broadcast(0x1.f00c4ep-3f));
    p = fma(f, p, broadcast(0x1.62f5fap-1f));
  }
  p = fma(f, p, broadcast(1.0f));
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ); // true for NaN
  return (F32)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
  const U32 exponent = (U32)(n + broadcast(12582912.0f)) << 23;
  const F32 scaled = (F32)((U32)p + exponent);
  return select(x >= broadcast(-126.0f), scaled, select(x == x, F32{}, x));
#endif
}

// 2^x for x <= 127 to a relative error of 1.7e-7 (kDegree 5) or 1e-4 (kDegree 3). Results below 2^-126 are
// zero, so that 2^-inf = 0 and no denormal slows what follows; a NaN stays one.
template <int kDegree> inline F32 exp2(F32 x) {
  const F32 c = max(broadcast(-127.0f), x); // the order keeps a NaN
  const F32 n = round(c);
  return exp2_parts<kDegree>(n, c - n, x);
}

// e^x for x <= 88, to a relative error of 2e-7; zero below -87.3, NaN for NaN.
inline F32 exp(F32 x) {
  const F32 c = max(broadcast(-88.0f), x);
  const F32 n = round(c * broadcast(0x1.715476p+0f));
  // n * 0.693359375 is exact: that constant has 9 bits.
  const F32 r = fma(n, broadcast(0x1.bd0106p-13f), c - n * broadcast(0x1.63p-1f));
  return exp2_parts<5>(n, r * broadcast(0x1.715476p+0f), x * broadcast(0x1.715476p+0f));
}

// x / (1 + e^-x)
inline F32 silu(F32 x) {
  const I32 is_negative = x < F32{};
  const F32 m = exp(select(is_negative, x, -x));
  return select(is_negative, x * m, x) / (broadcast(1.0f) + m);
}

// ---------------------------------------------------------------------------------------------- over vectors

#if defined(__AVX512BF16__)
// 32 fp8 numbers as bfloat16, exact; NaN becomes 480.
inline __m512i widen(__m256i bytes) {
  // Of 2^-6 and more: the biases of the exponents apart. Below, multiples of 2^-9 by the 3 bits that are
  // left.
  const __m512i small = _mm512_zextsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60)); // 0, 1, ... 7 * 2^-9
  const __m512i x = _mm512_cvtepi8_epi16(bytes);
  const __m512i field = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x07f0));
  const __m512i normal = _mm512_add_epi16(field, _mm512_set1_epi16(120 << 7));
  const __mmask32 is_small = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
  const __m512i magnitude = _mm512_mask_permutexvar_epi16(normal, is_small, x, small);
  constexpr int kAOrBAndC = 0xf8;
  return _mm512_ternarylogic_epi32(magnitude, x, _mm512_set1_epi16((int16_t)0x8000), kAOrBAndC);
}

inline void widen(const Fp8* from, BFloat16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    _mm512_storeu_si512(to + i, widen(_mm256_loadu_si256((const __m256i*)(from + i))));
  if (i < n) {
    const __mmask32 rest = (1u << (n - i)) - 1;
    _mm512_mask_storeu_epi16(to + i, rest, widen(_mm256_maskz_loadu_epi8(rest, from + i)));
  }
}
#endif

#if defined(__AVX512F__)
// x[i][j] <-> x[j][i]
inline void transpose(__m512i (&x)[16]) {
  constexpr __mmask16 all = kAllLanes;
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_maskz_unpacklo_epi32(all, x[i], x[i + 1]);
    y[i + 1] = _mm512_maskz_unpackhi_epi32(all, x[i], x[i + 1]);
  }
  // x[4 g + c]: column c of each 128 bits, rows 4 g ... 4 g + 3
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_maskz_unpacklo_epi64(0xff, y[i], y[i + 2]);
    x[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, y[i], y[i + 2]);
    x[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_maskz_shuffle_i32x4(all, x[c], x[4 + c], 0x88);
    const __m512i b = _mm512_maskz_shuffle_i32x4(all, x[c], x[4 + c], 0xdd);
    const __m512i e = _mm512_maskz_shuffle_i32x4(all, x[8 + c], x[12 + c], 0x88);
    const __m512i f = _mm512_maskz_shuffle_i32x4(all, x[8 + c], x[12 + c], 0xdd);
    y[c] = _mm512_maskz_shuffle_i32x4(all, a, e, 0x88);
    y[8 + c] = _mm512_maskz_shuffle_i32x4(all, a, e, 0xdd);
    y[4 + c] = _mm512_maskz_shuffle_i32x4(all, b, f, 0x88);
    y[12 + c] = _mm512_maskz_shuffle_i32x4(all, b, f, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    x[i] = y[i];
}
#endif

} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
