// What the kernels that multiply matrices share (paged_attention, linear): the element formats, and the inner
// product of a few rows, which lie in the lanes, with elements that are broadcast as they lie in memory.
// For files compiled once for each instruction set, as simd.h.
#pragma once

#include "cpu/simd.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 32 bits of an inner product: a float32 or two bfloat16.
typedef uint32_t Word __attribute__((may_alias));

inline U32 load_words(const Word* p) {
  U32 r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}

inline void store_words(Word* p, U32 x) { __builtin_memcpy(p, &x, sizeof x); }

// The first 2 kLanes elements of `left`, in pairs, zeros past them.
inline U32 load_pairs(const BFloat16* p, int64_t left) {
  U32 r{};
  if (left < 2 * kLanes)
    __builtin_memcpy(&r, p, left * sizeof(BFloat16));
  else
    __builtin_memcpy(&r, p, sizeof r);
  return r;
}

// n fp8 numbers as words of float32.
inline void widen(const Fp8* from, Word* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_up_to((float*)to + i, n - i, load_up_to(from + i, n - i));
}

// Accumulators of the inner product: kUnits keys, dims or rows of a weight x 2 vectors of rows. AVX-512 has
// 32 registers.
constexpr int kUnits = kLanes == 16 ? 8 : 4;

// An inner product goes over words of 32 bits, each kDepth elements. pack() makes words of a row of q or of
// rows of K, pack_values() of rows of V, whose words lie across keys. words() loads kLanes words of a row
// that has `left` more elements, zeros past them. Rows of K and V may also be fp8, which always is packed.
struct Float32 {
  using Element = float;
  static constexpr int kDepth = 1, kExpDegree = 5;
  static constexpr bool kPackK = false, kPackV = false;
  static F32 dot(F32 sum, U32 a, U32 b) { return fma((F32)a, (F32)b, sum); }
  static U32 to_word(F32 p, F32) { return (U32)p; }
  static void pack(const float* from, Word* to, int64_t n) { __builtin_memcpy(to, from, n * sizeof(float)); }
  static void pack(const Fp8* from, Word* to, int64_t n) { widen(from, to, n); }
  static void pack_values(const Fp8* from, Word* to, int64_t keys, int64_t head_dim) {
    widen(from, to, keys * head_dim);
  }
  static U32 words(const float* p, int64_t left) { return (U32)load_up_to(p, left); }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
struct NarrowFloat {
  using Element = BFloat16;
  static constexpr int kDepth = 2, kExpDegree = 3;
  static constexpr bool kPackK = false, kPackV = true;
  static F32 dot(F32 sum, U32 a, U32 b) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static U32 to_word(F32 even, F32 odd) { return round_to_bf16(even) | round_to_bf16(odd) << 16; }
  static void pack(const BFloat16* from, Word* to, int64_t n) {
    __builtin_memcpy(to, from, n * sizeof(BFloat16));
  }
  static void pack(const Fp8* from, Word* to, int64_t n) { widen(from, (BFloat16*)to, n); }
  static void pack_values(const BFloat16* from, Word* to, int64_t keys, int64_t head_dim) {
    for (; keys >= 2; keys -= 2, from += 2 * head_dim, to += head_dim)
      for (int64_t d = 0; d < head_dim; ++d)
        to[d] = (uint32_t)from[d].bits | (uint32_t)from[head_dim + d].bits << 16;
    if (keys == 1)
      for (int64_t d = 0; d < head_dim; ++d)
        to[d] = from[d].bits;
  }
  static void pack_values(const Fp8* from, Word* to, int64_t keys, int64_t head_dim) {
    constexpr int64_t kMostDims = 256;
    BFloat16 rows[2 * kMostDims];
    for (; keys > 0; keys -= 2, from += 2 * head_dim, to += head_dim) {
      widen(from, rows, min(keys, 2) * head_dim);
      pack_values(rows, to, min(keys, 2), head_dim);
    }
  }
  static U32 words(const BFloat16* p, int64_t left) { return load_pairs(p, left); }
};
#else
// Widened to float32. On CPUs with a tile unit vdpbf16ps does half the multiply-adds a second of float32 fma.
struct NarrowFloat {
  using Element = BFloat16;
  static constexpr int kDepth = 1, kExpDegree = 3;
  static constexpr bool kPackK = true, kPackV = true;
  static F32 dot(F32 sum, U32 a, U32 b) { return fma((F32)a, (F32)b, sum); }
  static U32 to_word(F32 p, F32) { return (U32)p; }
  static void pack(const BFloat16* from, Word* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      to[i] = (uint32_t)from[i].bits << 16;
  }
  static void pack(const Fp8* from, Word* to, int64_t n) { widen(from, to, n); }
  template <class Stored>
  static void pack_values(const Stored* from, Word* to, int64_t keys, int64_t head_dim) {
    pack(from, to, keys * head_dim);
  }
  static U32 words(const BFloat16* p, int64_t left) { return (U32)load_up_to(p, left); }
};
#endif

#define FASTDLLM_INLINE __attribute__((always_inline))

// sum[u][n] += sum over k < steps of a[u * unit + k * step] b[k][n], b contiguous. One line of `ahead` is
// asked for in every two steps: the loads of the next block spread evenly over the arithmetic of this one.
template <class Format, int kN, int kAheadStride>
FASTDLLM_INLINE inline void multiply(F32 (&sum)[kUnits][kN], const Word* a, int64_t unit, int64_t step,
                                     const Word* b, int64_t steps, const char* ahead) {
  const Word* c = a + kUnits / 2 * unit; // of the upper half of the units
  const auto one = [&](int64_t k, const Word* b_k) FASTDLLM_INLINE {
    U32 rows[kN];
    unroll<kN>([&](auto n) FASTDLLM_INLINE { rows[n] = load_words(b_k + n * kLanes); });
    unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
      const Word* from = (u < kUnits / 2 ? a : c) + k * step;
      const U32 x = broadcast(from[u % (kUnits / 2) * unit]);
      unroll<kN>([&](auto n) FASTDLLM_INLINE { sum[u][n] = Format::dot(sum[u][n], x, rows[n]); });
    });
  };
  int64_t k = 0;
  for (; k + 2 <= steps; k += 2) {
    if constexpr (kAheadStride > 0) {
      prefetch(ahead);
      ahead += kAheadStride;
    }
    one(0, b);
    one(1, b + kN * kLanes);
    a += 2 * step;
    c += 2 * step;
    b += 2 * kN * kLanes;
  }
  if (k < steps)
    one(0, b);
}

} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
