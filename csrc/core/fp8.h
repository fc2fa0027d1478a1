// The 8-bit float e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa. Its largest number is 448, below
// 2^-6 its numbers are multiples of 2^-9, and it has a NaN (0x7f) but no infinity. In integer arithmetic, so
// that host and device agree bit for bit.
#pragma once

#include <cstdint>

#include "core/philox.h" // FASTDLLM_HD

namespace fastdllm {

inline constexpr float kLargestFp8 = 448.0f;

// The bits of the nearest number, ties to the even one; what is larger becomes the largest, NaN is 0x7f.
FASTDLLM_HD uint8_t to_fp8(float x) {
  union {
    float value;
    uint32_t bits;
  } u{x};
  const uint32_t sign = u.bits >> 24 & 0x80;
  u.bits &= 0x7fffffff;
  if (u.bits > 0x7f800000)
    return 0x7f;
  if (u.value >= kLargestFp8)
    return static_cast<uint8_t>(sign | 0x7e);
  if (u.value < 0x1p-6f) { // the mantissa of 2^14 counts multiples of 2^-9
    u.value += 0x1p14f;
    return static_cast<uint8_t>(sign | (u.bits & 0x7fffff));
  }
  u.bits += 0x7ffff + (u.bits >> 20 & 1);
  return static_cast<uint8_t>(sign | ((u.bits >> 20) - (120 << 3)));
}

FASTDLLM_HD float from_fp8(uint8_t x) {
  union {
    uint32_t bits;
    float value;
  } u;
  const uint32_t sign = uint32_t{x} >> 7 << 31, magnitude = x & 0x7f;
  if (magnitude == 0x7f)
    u.bits = 0x7fc00000;
  else if (magnitude >= 8)
    u.bits = (magnitude + (120 << 3)) << 20;
  else
    u.value = static_cast<float>(magnitude) * 0x1p-9f;
  u.bits |= sign;
  return u.value;
}

// What a row of values is divided by, so that its largest magnitude becomes kLargestFp8. 1 where it would be
// 0: such a row becomes zeros. NaN, with the same bits everywhere, where the largest is NaN or infinite.
FASTDLLM_HD float fp8_scale(float largest) {
  const float scale = largest / kLargestFp8;
  if (!(scale <= 0x1.fffffep+127f))
    return from_fp8(0x7f);
  return scale == 0 ? 1.0f : scale;
}

} // namespace fastdllm
