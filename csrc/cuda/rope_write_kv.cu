// rope_write_kv: rotates q and k (half-split RoPE) and stores rotated k, and v, into pages.
//
//   q' = [a cos - b sin, b cos + a sin, rest],  a = q[: h], b = q[h : 2 h], h = rotary_dim / 2
//
//   q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, head_dim], heads side by side, strided tokens
//   cos, sin [positions, h] float32; positions, slots [tokens]
//   q_out like q, contiguous; k_pages, v_pages [pages, kv_heads, page_size, head_dim]
//
// Blocks (x, y): x is a token, y a share of its items, so that a block of 32 tokens still fills the device.
// An item is one head's kCount elements of a and of b, or kCount of the rest; a thread takes one. kCount is
// what 16 bytes hold where sizes, strides and addresses allow that, else 1. v has the same items, not
// rotated. Arithmetic in float32 without contraction, rounded once. Bytes: q, k and v read once and written
// once.
//
// With scales, pages hold e4m3 numbers: of a rotated key or a value x, s = fp8_scale(max |x|) and to_fp8(x /
// s). Then the items are those of q alone; in blocks of their own a warp takes a key or a value.
//
// A negative slot stores nothing. Slots are distinct; positions lie inside the table; head_dim is a multiple
// of 8, page_size a power of two.
#include "core/fp8.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostDims = 256;

template <int kCount> __host__ __device__ __forceinline__ int items_per_head(const RopeWriteKvParams& p) {
  return static_cast<int>(p.head_dim - p.rotary_dim / 2) / kCount;
}
template <int kCount> __host__ __device__ __forceinline__ int items_per_token(const RopeWriteKvParams& p) {
  return static_cast<int>(p.q_heads + (p.k_scales ? 0 : 2 * p.kv_heads)) * items_per_head<kCount>(p);
}
// Blocks for a token's items.
template <int kCount> __host__ __device__ __forceinline__ int item_blocks(const RopeWriteKvParams& p) {
  return (items_per_token<kCount>(p) + kThreads - 1) / kThreads;
}

// A warp for a key, or for one of the values behind them; lane l has the elements l, l + 32, ...
template <class T> __device__ void quantise(const RopeWriteKvParams& p, int64_t token, int vector) {
  const int kv_heads = static_cast<int>(p.kv_heads), lane = threadIdx.x % kWarp;
  const int64_t slot = p.slots[token];
  if (vector >= 2 * kv_heads || slot < 0)
    return;
  const bool is_key = vector < kv_heads;
  const int kv_head = is_key ? vector : vector - kv_heads, head_dim = static_cast<int>(p.head_dim);
  const T* in = (is_key ? static_cast<const T*>(p.k) + token * p.k_stride
                        : static_cast<const T*>(p.v) + token * p.v_stride) +
                int64_t{kv_head} * head_dim;
  const int half = is_key ? static_cast<int>(p.rotary_dim / 2) : 0;
  const float* cos = p.cos + p.positions[token] * half;
  const float* sin = p.sin + p.positions[token] * half;

  float x[kMostDims / kWarp] = {};
  uint32_t largest = 0; // by their bits magnitudes are ordered as integers, NaN above all
  unroll<kMostDims / kWarp>([&](int i) {
    const int d = lane + i * kWarp;
    if (d >= head_dim)
      return;
    x[i] = to_float(in[d]);
    if (d < half)
      x[i] = x[i] * cos[d] - to_float(in[d + half]) * sin[d];
    else if (d < 2 * half)
      x[i] = x[i] * cos[d - half] + to_float(in[d - half]) * sin[d - half];
    largest = Most{}(largest, __float_as_uint(x[i]) & 0x7fffffffu);
  });
  const float scale = fp8_scale(__uint_as_float(warp_reduce(largest, Most{})));

  const int64_t page = slot >> (31 - __clz(static_cast<int>(p.page_size)));
  const int64_t at = (page * kv_heads + kv_head) * p.page_size + slot % p.page_size;
  uint8_t* out = static_cast<uint8_t*>(is_key ? p.k_pages : p.v_pages) + at * head_dim;
  unroll<kMostDims / kWarp>([&](int i) {
    if (lane + i * kWarp < head_dim)
      out[lane + i * kWarp] = to_fp8(x[i] / scale);
  });
  if (lane == 0)
    (is_key ? p.k_scales : p.v_scales)[at] = scale;
}

template <class T, int kCount, bool kFp8>
__global__ void __launch_bounds__(kThreads) rotate_and_store(RopeWriteKvParams p) {
  using Unit = Pack<T, kCount>;
  using Angles = Pack<float, kCount>;
  if constexpr (kFp8) {
    const int block = static_cast<int>(blockIdx.y) - item_blocks<kCount>(p);
    if (block >= 0)
      return quantise<T>(p, blockIdx.x, block * kWarps + static_cast<int>(threadIdx.x / kWarp));
  }
  const int item = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (item >= items_per_token<kCount>(p))
    return;
  const int per_head = items_per_head<kCount>(p), half = static_cast<int>(p.rotary_dim / 2);
  const int head = item / per_head, q_heads = static_cast<int>(p.q_heads);
  const int kv_heads = static_cast<int>(p.kv_heads);
  const int64_t token = blockIdx.x, head_dim = p.head_dim;
  const bool is_rotated = head < q_heads + kv_heads;

  const T* in;
  T* out;
  if (head < q_heads) {
    in = static_cast<const T*>(p.q) + token * p.q_stride + head * head_dim;
    out = static_cast<T*>(p.q_out) + (token * q_heads + head) * head_dim;
  } else {
    const int64_t slot = p.slots[token];
    if (slot < 0)
      return;
    const int64_t page = slot >> (31 - __clz(static_cast<int>(p.page_size)));
    const int64_t kv_head = head - q_heads - (is_rotated ? 0 : kv_heads);
    in = is_rotated ? static_cast<const T*>(p.k) + token * p.k_stride
                    : static_cast<const T*>(p.v) + token * p.v_stride;
    in += kv_head * head_dim;
    out = static_cast<T*>(is_rotated ? p.k_pages : p.v_pages);
    out += ((page * kv_heads + kv_head) * p.page_size + slot % p.page_size) * head_dim;
  }

  const auto load = [in](int at) { return *reinterpret_cast<const Unit*>(in + at); };
  const auto store = [out](int at, const Unit& x) { *reinterpret_cast<Unit*>(out + at) = x; };
  const int at = item % per_head * kCount;
  if (at >= half) { // of the rest, which begins at 2 half
    store(at + half, load(at + half));
    return;
  }
  Unit a = load(at), b = load(at + half);
  if (is_rotated) {
    const int64_t angle = p.positions[token] * half + at;
    const Angles cos = *reinterpret_cast<const Angles*>(p.cos + angle);
    const Angles sin = *reinterpret_cast<const Angles*>(p.sin + angle);
    unroll<kCount>([&](int j) {
      const float x = to_float(a.x[j]), y = to_float(b.x[j]);
      a.x[j] = from_float<T>(x * cos.x[j] - y * sin.x[j]);
      b.x[j] = from_float<T>(y * cos.x[j] + x * sin.x[j]);
    });
  }
  store(at, a);
  store(at + half, b);
}

template <class T, int kCount> const char* launch_items(const RopeWriteKvParams& p, cudaStream_t stream) {
  const int64_t vector_blocks = p.k_scales ? (2 * p.kv_heads + kWarps - 1) / kWarps : 0;
  const dim3 grid(grid_size(p.tokens), grid_size(item_blocks<kCount>(p) + vector_blocks));
  const auto kernel = p.k_scales ? rotate_and_store<T, kCount, true> : rotate_and_store<T, kCount, false>;
  return launch(kernel, grid, kThreads, 0, stream, p);
}

template <class T> bool in_vectors(const RopeWriteKvParams& p) {
  constexpr int kCount = kVector<T>;
  const auto whole_angles = [](const float* x) { return is_aligned(x, sizeof(Pack<float, kCount>)); };
  return p.rotary_dim / 2 % kCount == 0 && is_whole<T>(p.q, p.q_stride) && is_whole<T>(p.k, p.k_stride) &&
         is_whole<T>(p.v, p.v_stride) && is_whole<T>(p.q_out, 0) && is_whole<T>(p.k_pages, 0) &&
         is_whole<T>(p.v_pages, 0) && whole_angles(p.cos) && whole_angles(p.sin);
}

} // namespace

const char* rope_write_kv(const RopeWriteKvParams& p, void* stream) {
  if (p.tokens == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return in_vectors<T>(p) ? launch_items<T, kVector<T>>(p, on) : launch_items<T, 1>(p, on);
  });
}

} // namespace fastdllm::cuda
