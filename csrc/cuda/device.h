// What the CUDA kernels share: storage types, reductions, the check after a launch. Only __syncthreads,
// __shfl_xor_sync and static shared memory are used, so that a host compiler can run the kernels too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "core/params.h"

namespace fastdllm::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------
// Elements in memory; arithmetic is in float.
// ---------------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

#ifdef __CUDACC__

__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <> __device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <> __device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

#else // the same on a host compiler

inline float to_float(BFloat16 x) {
  const uint32_t u = uint32_t{x.bits} << 16;
  float r;
  __builtin_memcpy(&r, &u, sizeof r);
  return r;
}
inline float to_float(Float16 x) {
  _Float16 h;
  __builtin_memcpy(&h, &x.bits, sizeof h);
  return static_cast<float>(h);
}

template <> inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  const uint32_t rounded = x == x ? u + 0x7fffu + (u >> 16 & 1u) : u | 0x400000u;
  return {static_cast<uint16_t>(rounded >> 16)};
}
template <> inline Float16 from_float<Float16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  Float16 r;
  __builtin_memcpy(&r.bits, &h, sizeof h);
  return r;
}

#endif

// ---------------------------------------------------------------------------------------------------------
// Reductions. Every lane, or thread, gets the result; the order is fixed, so the bits are too.
// ---------------------------------------------------------------------------------------------------------

template <class T> __device__ __forceinline__ T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}

template <class T, class Op> __device__ __forceinline__ T warp_reduce(T x, Op op) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    x = op(x, shuffle_xor(x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}

// Over a block of whole warps; `shared` has kWarp elements and is free again afterwards.
template <class T, class Op> __device__ T block_reduce(T x, T identity, Op op, T* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_reduce(x, op);
  if (lane == 0)
    shared[warp] = x;
  __syncthreads();
  x = warp_reduce(lane < warps ? shared[lane] : identity, op);
  __syncthreads();
  return x;
}

// ---------------------------------------------------------------------------------------------------------
// Ragged batches and launches
// ---------------------------------------------------------------------------------------------------------

// The sequence b with offsets[b] <= i < offsets[b + 1]; -1 for i past the last.
__device__ __forceinline__ int64_t sequence_of(int64_t i, const int32_t* offsets, int64_t sequences) {
  if (sequences == 0 || i >= offsets[sequences])
    return -1;
  int64_t low = 0, high = sequences - 1; // the first b with offsets[b + 1] > i
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] > i)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// f of a value of the element type; its error text.
template <class F> const char* by_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
  case Dtype::kFloat32:
    return f(float{});
  case Dtype::kFloat16:
    return f(Float16{});
  case Dtype::kBFloat16:
    return f(BFloat16{});
  }
  return "the dtype is not one of float32, float16, bfloat16";
}

} // namespace fastdllm::cuda
