// bfloat16 of the emulator: round to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = __float_as_uint(x);
  const uint32_t rounded = x == x ? u + 0x7fffu + (u >> 16 & 1u) : 0x7fff0000u;
  return {static_cast<uint16_t>(rounded >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
