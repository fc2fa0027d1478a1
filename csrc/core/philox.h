// Philox4x32-10 (Salmon et al., SC'11): counter-based random numbers, the same on every device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTDLLM_HD static __host__ __device__ __forceinline__
#else
#define FASTDLLM_HD static inline
#endif

namespace fastdllm {

struct Philox4 {
  uint32_t x[4];
};

FASTDLLM_HD Philox4 philox4x32(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

} // namespace fastdllm
