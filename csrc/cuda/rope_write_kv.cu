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
// A negative slot stores nothing. Slots are distinct; positions lie inside the table; head_dim is a multiple
// of 8, page_size a power of two.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 128;

template <int kCount> __host__ __device__ __forceinline__ int items_per_head(const RopeWriteKvParams& p) {
  return static_cast<int>(p.head_dim - p.rotary_dim / 2) / kCount;
}
template <int kCount> __host__ __device__ __forceinline__ int items_per_token(const RopeWriteKvParams& p) {
  return static_cast<int>(p.q_heads + 2 * p.kv_heads) * items_per_head<kCount>(p);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) rotate_and_store(RopeWriteKvParams p) {
  using Unit = Pack<T, kCount>;
  using Angles = Pack<float, kCount>;
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
  const dim3 grid(grid_size(p.tokens), grid_size((items_per_token<kCount>(p) + kThreads - 1) / kThreads));
  return launch(rotate_and_store<T, kCount>, grid, kThreads, 0, stream, p);
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
