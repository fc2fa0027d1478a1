// What the CUDA kernels share: storage types, shared memory, reductions, launches.
//
// A kernel uses __syncthreads, __syncwarp, warp shuffles, atomics, dynamic shared memory and what ptx.h
// wraps, and nothing else of CUDA: the emulator of tests/simt provides exactly that on a host compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/params.h"

namespace fastdllm::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLargest = 0x1.fffffep+127f;

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
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <> __device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// kCount elements that are loaded and stored at once.
template <class T, int kCount> struct alignas(sizeof(T) * kCount) Pack {
  T x[kCount];
};
// As many as 16 bytes hold.
template <class T> inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));
template <class T> using Vector = Pack<T, kVector<T>>;

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
// Whether rows that lie `stride` elements apart all begin where a Vector may.
template <class T> bool is_whole(const void* p, int64_t stride) {
  return is_aligned(p, sizeof(Vector<T>)) && stride % kVector<T> == 0;
}

// f(0), f(1), ... f(kN - 1).
template <int kN, class F> __device__ __forceinline__ void unroll(const F& f) {
  if constexpr (kN > 0) {
    unroll<kN - 1>(f);
    f(kN - 1);
  }
}

// Elements first, first + 1, ... of a row of `length`, zeros past its end. kWhole: it is_whole, and its
// length is a multiple of kVector; else element by element.
template <bool kWhole, class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t first, int64_t length) {
  Vector<T> v;
  if constexpr (kWhole)
    v = *reinterpret_cast<const Vector<T>*>(row + first);
  else
    unroll<kVector<T>>([&](int j) { v.x[j] = first + j < length ? row[first + j] : T{}; });
  return v;
}
template <bool kWhole, class T, int kCount>
__device__ __forceinline__ void store_vector(T* row, int64_t first, int64_t length,
                                             const Pack<T, kCount>& v) {
  if constexpr (kWhole)
    *reinterpret_cast<Pack<T, kCount>*>(row + first) = v;
  else
    unroll<kCount>([&](int j) {
      if (first + j < length)
        row[first + j] = v.x[j];
    });
}

// ---------------------------------------------------------------------------------------------------------
// Shared memory is always dynamic: one object of type Shared at its start, sizeof(Shared) and more at launch.
// ---------------------------------------------------------------------------------------------------------

template <class Shared> __device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return *reinterpret_cast<Shared*>(dynamic_shared);
}

// ---------------------------------------------------------------------------------------------------------
// Reductions. Every lane, or thread, gets the result; the order is fixed, so the bits are too.
// ---------------------------------------------------------------------------------------------------------

template <class T> __device__ __forceinline__ T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}

// Over groups of `width` lanes, a power of two.
template <class T, class Op> __device__ __forceinline__ T warp_reduce(T x, Op op, int width = kWarp) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2)
    x = op(x, shuffle_xor(x, lanes));
  return x;
}

struct Sum {
  template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Least {
  template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a < b ? a : b; }
};
struct Most {
  template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a < b ? b : a; }
};

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

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A count of blocks; one that is too large stays so, and the launch fails.
inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(blocks < 0xffffffff ? blocks : 0xffffffff);
}

// Launches kernel(args...); the error text, or nullptr.
template <class... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError(); // clears it
      return cudaGetErrorString(error);
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess)
    error = cudaGetLastError();
  else
    cudaGetLastError();
  return error_text(error);
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
