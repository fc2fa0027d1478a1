// Rows of numbers as e4m3 numbers with a scale.
// For files compiled once for each instruction set, as simd.h.
#pragma once

#include "core/fp8.h"
#include "cpu/simd.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

// Stores x / s, a true division: 1 / s is infinite where s is denormal. Returns s = fp8_scale(max |x|).
template <class T> float quantise(const T* x, Fp8* out, int64_t n) {
  I32 largest{}; // as the integers of their bits, magnitudes have the order of the numbers, NaN above all
  for (int64_t i = 0; i < n; i += kLanes) {
    const I32 magnitude = bits(load_up_to(x + i, n - i)) & 0x7fffffff;
    largest = select(magnitude > largest, magnitude, largest);
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i)
    most = largest[i] > most ? largest[i] : most;
  const float scale = fp8_scale(__builtin_bit_cast(float, most));
  for (int64_t i = 0; i < n; i += kLanes)
    store_up_to(out + i, n - i, load_up_to(x + i, n - i) / broadcast(scale));
  return scale;
}

} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
