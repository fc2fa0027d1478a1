// float16 of the emulator, by the host compiler's own type.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline __half __float2half_rn(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  __half r;
  std::memcpy(&r.bits, &h, sizeof h);
  return r;
}
inline float __half2float(__half x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, sizeof h);
  return static_cast<float>(h);
}
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
