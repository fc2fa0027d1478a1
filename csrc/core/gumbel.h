// Gumbel noise with the same bits on every device and instruction set:
//   u = (word + 1/2) 2^-32 in (0, 1),  g = -log(-log(1 - u)),  candidate = argmax over tokens of l / T + g
//
// A large g comes from a small u, where log1p keeps its resolution: the largest g is 22.87. Only IEEE + - * /
// and integer operations are used, each rounded on its own. Host files that use this need -ffp-contract=off;
// on CUDA, intrinsics that the compiler never fuses stand in for the operators.
//
// A function takes Float = float with Word = uint32_t, or vectors of them, which it treats lane by lane.
// Templates are static: their instances must not be shared by files compiled for different instruction sets.
#pragma once

#include <cstdint>

#include "core/philox.h"

#ifdef __FAST_MATH__
#error "the sampling noise needs IEEE arithmetic"
#endif

namespace fastdllm {

// Philox counter word 0 of a position's own random numbers: word 0 is its random score, word 1 the noise of
// its rank. A token's counter word is token_id / 4, and it takes word token_id % 4.
inline constexpr uint32_t kNoToken = 0xFFFFFFFFu;

// No noise is above this.
inline constexpr float kGumbelMax = 22.875f;

template <class To, class From> FASTDLLM_HD To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To r;
  __builtin_memcpy(&r, &x, sizeof r);
  return r;
}

// a b + c, rounded twice.
template <class Float, class C> FASTDLLM_HD Float mul_add(Float a, Float b, C c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

template <class Float> FASTDLLM_HD Float divide(Float a, Float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// (0, 1) from a Philox word that was converted to float, to nearest.
template <class Float> FASTDLLM_HD Float uniform(Float word) {
  const Float u = (word + 0.5f) * 0x1p-32f, below_one = Float{} + 0x1.fffffep-1f;
  return u < below_one ? u : below_one;
}

// log x for 2^-60 < x < 2^60, to one ulp. x = 2^e m with m in [sqrt(1/2), sqrt(2)), and
// log m = f - f^2 / 2 + f^3 P(f) with f = m - 1; P is minimax in the relative error of log m.
template <class Word, class Float> FASTDLLM_HD Float natural_log(Float x) {
  constexpr uint32_t kBias = 64u << 23;
  const Word b = same_bits<Word>(x);
  const Word biased = (b - (0x3f3504f3u - kBias)) >> 23; // e + 64
  const Float e = same_bits<Float>(biased | 0x4b000000u) - (8388608.0f + 64.0f);
  const Float f = same_bits<Float>(b - (biased << 23) + kBias) - 1.0f;
  const Float f2 = f * f;
  Float p = mul_add(f, Float{} - 0.07634493f, 0.12761575f);
  p = mul_add(p, f, -0.13160183f);
  p = mul_add(p, f, 0.14201759f);
  p = mul_add(p, f, -0.16623357f);
  p = mul_add(p, f, 0.20001227f);
  p = mul_add(p, f, -0.2500082f);
  p = mul_add(p, f, 0.3333333f);
  const Float small = mul_add(f2 * f, p, e * -0x1.bd0106p-13f); // log 2 = 0x1.63p-1 - 0x1.bd0106p-13
  return mul_add(e, Float{} + 0x1.63p-1f, mul_add(f2, Float{} - 0.5f, small) + f);
}

// Standard Gumbel noise from a Philox word that was converted to float, to nearest. w = 1 - u is rounded, and
// (1 - w) - u is what it lost: log(1 - u) = log(w) + ((1 - w) - u) / w, exact to second order.
template <class Word, class Float> FASTDLLM_HD Float gumbel(Float word) {
  const Float u = uniform(word);
  const Float w = 1.0f - u;
  const Float exponential = natural_log<Word>(w) + divide((1.0f - w) - u, w);
  return -natural_log<Word>(-exponential);
}

// What the candidate of a row with T > 0 maximises, and what its positions are ranked by, with c for the
// logit and rank_temperature for T. |logit| / T must not overflow.
template <class Float> FASTDLLM_HD Float noisy_logit(Float logit, Float temperature, Float noise) {
  return divide(logit, temperature) + noise;
}

} // namespace fastdllm
