// CUDA on a host compiler: the part of cuda_runtime.h that csrc/cuda uses, so that its .cu files compile and
// run as they are. Put this folder before all others on the include path and compile with -x c++.
//
// Every CUDA thread is a fiber with a stack of its own; the threads of one block share one OS thread and take
// turns where they synchronise, in an order that the schedule picks (simt::set_schedule). Blocks run one
// after another. emulator.cpp holds the scheduler and the list of what it checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---------------------------------------------------------------------------------------------------------
// The scheduler's face
// ---------------------------------------------------------------------------------------------------------

namespace simt {

struct Thread {
  dim3 index;
  unsigned lane;
};
extern const Thread* current;

// What a warp does together. All its live lanes must arrive at the same one.
enum class Together : int { kSync, kShuffle, kBallot, kMma, kLdmatrix };

inline constexpr int kLaneBytes = 64;
struct alignas(64) LaneData {
  unsigned char bytes[kLaneBytes];
};
// Hands in `mine`; the lane that comes last runs `all` over the 32 lanes' data (those that have exited hold
// zeros); then every lane gets its own data back. A nullptr leaves the data as handed in.
using WarpWork = void (*)(LaneData* lanes);
void warp_together(Together what, LaneData& mine, WarpWork all);
// All lanes' data of the collective that this lane has just come through.
const LaneData* warp_data();

void sync_threads();
// Lets others run. For a loop that waits: reports a deadlock where nothing can change any more.
void wait_turn();
// Ends the launch with an error that names the kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Asynchronous copies (zeros where source is null) happen at once, at some later turn, or as late as they
// may: the schedule decides for each. A thread's own copies, in groups:
void copy_later(void* target, const void* source, unsigned bytes);
void close_group();
void wait_groups(int64_t still_open); // until all but the last `still_open` groups are there
// A copy by the block; done(argument, bytes) once it is there.
void bulk_copy_later(void* target, const void* source, unsigned bytes, void (*done)(void*, unsigned),
                     void* argument);
bool in_shared(const void* p, size_t bytes);

template <class T> LaneData pack(const T& x) {
  static_assert(sizeof(T) <= kLaneBytes && std::is_trivially_copyable_v<T>);
  LaneData data;
  std::memcpy(data.bytes, &x, sizeof x);
  return data;
}
template <class T> T unpack(const LaneData& data) {
  T x;
  std::memcpy(&x, data.bytes, sizeof x);
  return x;
}

int launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
           const std::function<void()>& body);

} // namespace simt

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------------------------------------------------
// Device functions
// ---------------------------------------------------------------------------------------------------------

inline void __syncthreads() { simt::sync_threads(); }
inline void __syncwarp(unsigned = ~0u) {
  simt::LaneData none{};
  simt::warp_together(simt::Together::kSync, none, nullptr);
}
template <class T> T __shfl_sync(unsigned, T x, int source) {
  simt::LaneData data = simt::pack(x);
  simt::warp_together(simt::Together::kShuffle, data, nullptr);
  return simt::unpack<T>(simt::warp_data()[source & 31]);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, static_cast<int>(simt::current->lane) ^ lanes);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  simt::LaneData data = simt::pack(predicate != 0);
  simt::warp_together(simt::Together::kBallot, data, [](simt::LaneData* lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i)
      all |= static_cast<unsigned>(simt::unpack<bool>(lanes[i])) << i;
    for (int i = 0; i < 32; ++i)
      lanes[i] = simt::pack(all);
  });
  return simt::unpack<unsigned>(data);
}
inline void __threadfence() {}
template <class T> T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = old + x;
  return old;
}
inline float __uint_as_float(uint32_t x) {
  float r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// ---------------------------------------------------------------------------------------------------------
// Host functions
// ---------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t : int {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchFailure
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
};
inline constexpr int CUDART_VERSION = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given... args) {
  return static_cast<cudaError_t>(simt::launch(__PRETTY_FUNCTION__, reinterpret_cast<const void*>(kernel),
                                               config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                               [=] { kernel(args...); }));
}
