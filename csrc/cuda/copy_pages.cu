// copy_pages: copies page src[i] over page dst[i] in every one of `outer` pools.
//
//   pages: `outer` pools, outer_stride_bytes apart, of pages of page_bytes each; src, dst [pairs]
//
// Blocks (x, y): x is a pair in a pool, y a share of its page. A thread copies 16 bytes at a time where
// pages, pools and the base are aligned so, else single bytes. Bytes: each page read once and written once.
//
// Destinations are distinct and none is a source, so the order does not matter.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 8; // aimed at

template <class Unit> __global__ void __launch_bounds__(kThreads) copy(CopyPagesParams p) {
  const int64_t pair = blockIdx.x % p.pairs, pool = blockIdx.x / p.pairs;
  char* base = static_cast<char*>(p.pages) + pool * p.outer_stride_bytes;
  const Unit* from = reinterpret_cast<const Unit*>(base + p.src[pair] * p.page_bytes);
  Unit* to = reinterpret_cast<Unit*>(base + p.dst[pair] * p.page_bytes);
  const int64_t units = p.page_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  for (int64_t i = first; i < units; i += static_cast<int64_t>(gridDim.y) * kThreads)
    to[i] = from[i];
}

template <class Unit> const char* copy_all(const CopyPagesParams& p, cudaStream_t stream) {
  const int64_t units = p.page_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t shares = (units + kThreads * kUnitsPerThread - 1) / (kThreads * kUnitsPerThread);
  const dim3 grid(grid_size(p.pairs * p.outer), grid_size(shares < 1024 ? shares : 1024));
  return launch(copy<Unit>, grid, kThreads, 0, stream, p);
}

} // namespace

const char* copy_pages(const CopyPagesParams& p, void* stream) {
  if (p.pairs == 0 || p.outer == 0 || p.page_bytes == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t bits =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.pages)) | p.outer_stride_bytes | p.page_bytes;
  return bits % 16 == 0 ? copy_all<uint4>(p, on) : copy_all<unsigned char>(p, on);
}

} // namespace fastdllm::cuda
