// csrc/cuda/ptx.h for the emulator: the same functions, with the semantics that the PTX manual gives them.
// Addresses are checked for shared memory and alignment; copies arrive when the schedule says
// (cuda_runtime.h).
#pragma once

#include "cuda/device.h"

namespace fastdllm::cuda {

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y; // a NaN stays one
}

template <class T> inline uint32_t pack_two(float low, float high) {
  return uint32_t{from_float<T>(high).bits} << 16 | from_float<T>(low).bits;
}

template <class T> inline float element(uint32_t word, int i) {
  return to_float(T{static_cast<uint16_t>(i ? word >> 16 : word & 0xffff)});
}

// By way of double and float: a device rounds once, which differs where float ends in the middle of two
// bfloat16, and so never for a product with a power of two.
inline uint32_t fma_two(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int i) {
    const double product = double{element<BFloat16>(a, i)} * element<BFloat16>(b, i);
    return static_cast<float>(product + element<BFloat16>(c, i));
  };
  return pack_two<BFloat16>(one(0), one(1));
}

// ---------------------------------------------------------------------------------------------------------
// Tensor cores
// ---------------------------------------------------------------------------------------------------------

struct MmaLane {
  float d[4];
  uint32_t a[4], b[2];
};

template <class T> inline void mma_warp(simt::LaneData* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane x = simt::unpack<MmaLane>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i)
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = element<T>(x.a[r], i);
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < 2; ++i)
        b[2 * t + r * 8 + i][g] = element<T>(x.b[r], i);
  }
  float sums[16][8] = {}; // a tensor core adds in some order of its own; products are exact in float
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n)
        sums[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    MmaLane x = simt::unpack<MmaLane>(lanes[lane]);
    for (int i = 0; i < 4; ++i)
      x.d[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    lanes[lane] = simt::pack(x);
  }
}

template <class T> inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane x{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::LaneData data = simt::pack(x);
  simt::warp_together(simt::Together::kMma, data, mma_warp<T>);
  x = simt::unpack<MmaLane>(data);
  std::memcpy(d, x.d, sizeof d);
}

struct LdmatrixLane {
  const unsigned char* row;
  uint32_t r[4];
};

template <bool kTransposed> inline void ldmatrix_warp(simt::LaneData* lanes) {
  const unsigned char* rows[32];
  for (int lane = 0; lane < 32; ++lane)
    rows[lane] = simt::unpack<LdmatrixLane>(lanes[lane]).row;
  for (int lane = 0; lane < 32; ++lane) {
    LdmatrixLane x{};
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int line = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
        std::memcpy(&pair[i], rows[8 * matrix + line] + 2 * column, sizeof pair[i]);
      }
      x.r[matrix] = uint32_t{pair[1]} << 16 | pair[0];
    }
    lanes[lane] = simt::pack(x);
  }
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, simt::WarpWork work) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    simt::fail("ldmatrix: a row that is not on 16 bytes");
  if (!simt::in_shared(row, 16))
    simt::fail("ldmatrix: a row outside of shared memory");
  simt::LaneData data = simt::pack(LdmatrixLane{static_cast<const unsigned char*>(row), {}});
  simt::warp_together(simt::Together::kLdmatrix, data, work);
  std::memcpy(r, simt::unpack<LdmatrixLane>(data).r, sizeof r);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, ldmatrix_warp<false>); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, ldmatrix_warp<true>); }

// ---------------------------------------------------------------------------------------------------------
// Asynchronous copies
// ---------------------------------------------------------------------------------------------------------

inline void check_copy(const void* shared, const void* global, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    simt::fail("an asynchronous copy that is not of whole 16 bytes on 16 bytes");
  if (!simt::in_shared(shared, bytes))
    simt::fail("an asynchronous copy to outside of shared memory");
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  check_copy(shared, valid ? global : nullptr, 16);
  simt::copy_later(shared, valid ? global : nullptr, 16);
}
inline void cp_async_commit() { simt::close_group(); }
template <int kGroups> inline void cp_async_wait() { simt::wait_groups(kGroups); }

// ---------------------------------------------------------------------------------------------------------
// Bulk copies. Inside the 64 bits of a barrier: announced minus arrived bytes, arrivals a phase and still to
// come, the phase.
// ---------------------------------------------------------------------------------------------------------

struct Barrier {
  int32_t bytes;
  uint8_t arrivals, pending;
  uint16_t phase;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline Barrier load_barrier(const uint64_t* p) {
  if (!simt::in_shared(p, sizeof *p))
    simt::fail("a barrier outside of shared memory");
  return simt::unpack<Barrier>(simt::pack(*p));
}
inline void store_barrier(uint64_t* p, Barrier barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
  }
  std::memcpy(p, &barrier, sizeof barrier);
}
inline void mbarrier_init(uint64_t* p, uint32_t arrivals) {
  load_barrier(p);
  store_barrier(p, {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0});
}
inline void mbarrier_arrive_expect(uint64_t* p, uint32_t bytes) {
  Barrier barrier = load_barrier(p);
  if (barrier.pending == 0)
    simt::fail("mbarrier: more arrivals than the phase takes");
  barrier.bytes += static_cast<int32_t>(bytes);
  --barrier.pending;
  store_barrier(p, barrier);
}
inline void mbarrier_wait(uint64_t* p, uint32_t parity) {
  while ((load_barrier(p).phase & 1u) == parity)
    simt::wait_turn();
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(shared, global, bytes);
  load_barrier(barrier);
  simt::bulk_copy_later(
      shared, global, bytes,
      [](void* target, unsigned count) {
        auto* p = static_cast<uint64_t*>(target);
        Barrier b = load_barrier(p);
        b.bytes -= static_cast<int32_t>(count);
        store_barrier(p, b);
      },
      barrier);
}

} // namespace fastdllm::cuda
