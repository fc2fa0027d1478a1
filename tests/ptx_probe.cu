// One kernel of one warp for each wrapper of cuda/ptx.h, with flat arrays in and out: tests/test_ptx.py
// compares what comes out with the PTX manual, in the emulator and, where there is one, on a device.
#include "cuda/ptx.h"

namespace fastdllm::cuda {
namespace {

constexpr int kRows = 64, kRowBytes = 16;

struct Tile {
  alignas(128) unsigned char bytes[kRows * kRowBytes];
  uint64_t barrier;
};

// a [32][4], b [32][2], d [32][4]
template <class T> __global__ void mma(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  uint32_t own_a[4];
  float own_d[4];
  for (int i = 0; i < 4; ++i) {
    own_a[i] = a[4 * lane + i];
    own_d[i] = d[4 * lane + i];
  }
  mma_m16n8k16<T>(own_d, own_a, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i)
    d[4 * lane + i] = own_d[i];
}

// Rows of 16 bytes in shared memory; lane l names row rows[l]. out [32][4]
template <bool kTransposed>
__global__ void ldmatrix_of(const unsigned char* image, const int32_t* rows, uint32_t* out) {
  Tile& tile = shared_memory<Tile>();
  for (int i = threadIdx.x; i < kRows * kRowBytes; i += kWarp)
    tile.bytes[i] = image[i];
  __syncwarp();
  uint32_t r[4];
  if constexpr (kTransposed)
    ldmatrix_x4_trans(r, tile.bytes + kRowBytes * rows[threadIdx.x]);
  else
    ldmatrix_x4(r, tile.bytes + kRowBytes * rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i)
    out[4 * threadIdx.x + i] = r[i];
}

// Two groups of 32 rows; after the first wait each lane reads its own row of the first group, after the
// second wait and a barrier its neighbour's row of the second. valid [64]; out [64][16]
__global__ void copies(const unsigned char* image, const int32_t* valid, unsigned char* out) {
  Tile& tile = shared_memory<Tile>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < kRows * kRowBytes; i += kWarp)
    tile.bytes[i] = 0x77;
  __syncwarp();
  for (int group = 0; group < 2; ++group) {
    const int row = group * kWarp + lane;
    cp_async_16(tile.bytes + kRowBytes * row, image + kRowBytes * row, valid[row] != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < kRowBytes; ++i)
    out[kRowBytes * lane + i] = tile.bytes[kRowBytes * lane + i];
  cp_async_wait<0>();
  __syncwarp();
  const int row = kWarp + (lane + 1) % kWarp;
  for (int i = 0; i < kRowBytes; ++i)
    out[kRowBytes * row + i] = tile.bytes[kRowBytes * row + i];
}

// `rounds` phases of one barrier: in each, lanes copy 16 (lane % 2 + 1) bytes, and all read them back after
// the wait. image, out [rounds][kRows][16]
__global__ void bulk(const unsigned char* image, int32_t rounds, unsigned char* out) {
  Tile& tile = shared_memory<Tile>();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0)
    mbarrier_init(&tile.barrier, 1);
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const unsigned char* from = image + round * kRows * kRowBytes;
    if (lane == 0)
      mbarrier_arrive_expect(&tile.barrier, 48 * kRowBytes);
    __syncwarp();
    const int row = lane / 2 * 3 + lane % 2;
    bulk_copy(tile.bytes + kRowBytes * row, from + kRowBytes * row, kRowBytes * (lane % 2 + 1),
              &tile.barrier);
    mbarrier_wait(&tile.barrier, round & 1);
    for (int i = lane; i < 48 * kRowBytes; i += kWarp)
      out[round * kRows * kRowBytes + i] = tile.bytes[i];
    __syncthreads();
  }
}

// x [n] -> powers [n], halves [n / 2], brains [n / 2]; abc [3][32] -> sums [32]
__global__ void elementwise(const float* x, int32_t n, float* powers, uint32_t* halves, uint32_t* brains,
                            const uint32_t* abc, uint32_t* sums) {
  sums[threadIdx.x] = fma_two(abc[threadIdx.x], abc[kWarp + threadIdx.x], abc[2 * kWarp + threadIdx.x]);
  for (int i = threadIdx.x; i < n; i += kWarp)
    powers[i] = exp2_approx(x[i]);
  for (int i = threadIdx.x; i < n / 2; i += kWarp) {
    halves[i] = pack_two<Float16>(x[2 * i], x[2 * i + 1]);
    brains[i] = pack_two<BFloat16>(x[2 * i], x[2 * i + 1]);
  }
}

template <class... Args> const char* run(void (*kernel)(Args...), Args... args) {
  return launch(kernel, dim3(1), kWarp, sizeof(Tile), nullptr, args...);
}

} // namespace
} // namespace fastdllm::cuda

using namespace fastdllm::cuda;

#define FASTDLLM_PROBE extern "C" __attribute__((visibility("default"))) const char*

FASTDLLM_PROBE probe_mma(int32_t bfloat16, const uint32_t* a, const uint32_t* b, float* d) {
  return bfloat16 ? run(mma<BFloat16>, a, b, d) : run(mma<Float16>, a, b, d);
}
FASTDLLM_PROBE probe_ldmatrix(int32_t transposed, const unsigned char* image, const int32_t* rows,
                              uint32_t* out) {
  return transposed ? run(ldmatrix_of<true>, image, rows, out) : run(ldmatrix_of<false>, image, rows, out);
}
FASTDLLM_PROBE probe_copies(const unsigned char* image, const int32_t* valid, unsigned char* out) {
  return run(copies, image, valid, out);
}
FASTDLLM_PROBE probe_bulk(const unsigned char* image, int32_t rounds, unsigned char* out) {
  return run(bulk, image, rounds, out);
}
FASTDLLM_PROBE probe_elementwise(const float* x, int32_t n, float* powers, uint32_t* halves, uint32_t* brains,
                                 const uint32_t* abc, uint32_t* sums) {
  return run(elementwise, x, n, powers, halves, brains, abc, sums);
}
