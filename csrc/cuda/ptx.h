// Instructions that CUDA C++ has no function for, one small wrapper each. tests/simt/cuda/ptx.h holds the
// same functions for the emulator; tests/test_ptx.py checks both against the PTX manual.
#pragma once

#include "cuda/device.h"

namespace fastdllm::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 2^x, to two ulp; denormals are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two elements side by side, `low` at the lower address.
template <class T> __device__ __forceinline__ uint32_t pack_two(float low, float high);
template <> __device__ __forceinline__ uint32_t pack_two<BFloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <> __device__ __forceinline__ uint32_t pack_two<Float16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// a b + c of two bfloat16 side by side, each rounded once; denormals stay.
__device__ __forceinline__ uint32_t fma_two(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// ---------------------------------------------------------------------------------------------------------
// Tensor cores. With g = lane / 4 and t = lane % 4, a register holds two elements:
//   A [16][16]: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8), and the next column each
//   B [16][8]:  b0 (2t, g), b1 (2t + 8, g), and the next row each
//   D [16][8]:  d0, d1 (g, 2t and 2t + 1), d2, d3 (g + 8, likewise), float
// ---------------------------------------------------------------------------------------------------------

// d += A B
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements out of shared memory. Lane l gives the address of row l % 8 of
// matrix l / 8, 16 bytes on a 16-byte boundary; register i gets elements (g, 2t) and (g, 2t + 1) of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---------------------------------------------------------------------------------------------------------
// Asynchronous copies of 16 bytes into shared memory, by the thread itself. A wait is for the thread's own
// copies: others see them after a barrier.
// ---------------------------------------------------------------------------------------------------------

// Zeros where not `valid`; then `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of the copies so far.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kGroups groups have arrived.
template <int kGroups> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---------------------------------------------------------------------------------------------------------
// Bulk copies (compute capability 9.0 and later; elsewhere these trap). A barrier completes a phase once
// `arrivals` arrivals came and as many bytes were copied as were announced; its phases count 0, 1, 2, ...
// ---------------------------------------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
#define FASTDLLM_SM90(code) code
#else
#define FASTDLLM_SM90(code) __trap()
#endif

// By one thread; a __syncthreads must follow before others use it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  FASTDLLM_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n"
                             "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier)),
                             "r"(arrivals) : "memory"));
}
// One arrival, and so many bytes to come in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  FASTDLLM_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                   "r"(bytes) : "memory"));
}
// Until the phase of this parity is complete: 0 for the first, third, ... phase.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  FASTDLLM_SM90(asm volatile("{\n"
                             ".reg .pred done;\n"
                             "again%=:\n"
                             "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                             "@!done bra again%=;\n"
                             "}" ::"r"(shared_address(barrier)),
                             "r"(parity) : "memory"));
}
// Copies `bytes` (a multiple of 16, both addresses on 16 bytes) and reports them to the barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  FASTDLLM_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)) : "memory"));
}

#undef FASTDLLM_SM90

} // namespace fastdllm::cuda
