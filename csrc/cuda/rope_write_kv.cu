// rope_write_kv: rotates q and k (half-split RoPE) and stores rotated k, and v, into pages.
//
//   q' = [a cos - b sin, b cos + a sin, rest],  a = q[: h], b = q[h : 2 h], h = rotary_dim / 2
//
//   q [tokens, q_heads, head_dim], k, v [tokens, kv_heads, head_dim], heads side by side, strided tokens
//   cos, sin [positions, h] float32; positions, slots [tokens]
//   q_out like q, contiguous; k_pages, v_pages [pages, kv_heads, page_size, head_dim]
//
// A block takes a token. A thread takes one pair (a_i, b_i), one element of the rest, or one of v, in float32
// and rounded once. Bytes: q, k and v read once and written once.
//
// A negative slot stores nothing. Slots are distinct; positions lie inside the table.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 256;

template <class T> __global__ void __launch_bounds__(kThreads) rotate_and_store(RopeWriteKvParams p) {
  const int64_t token = blockIdx.x, slot = p.slots[token];
  const int head_dim = static_cast<int>(p.head_dim), half = static_cast<int>(p.rotary_dim / 2);
  const int q_heads = static_cast<int>(p.q_heads), kv_heads = static_cast<int>(p.kv_heads);
  const float* cos = p.cos + p.positions[token] * half;
  const float* sin = p.sin + p.positions[token] * half;
  const T* q = static_cast<const T*>(p.q) + token * p.q_stride;
  const T* k = static_cast<const T*>(p.k) + token * p.k_stride;
  const T* v = static_cast<const T*>(p.v) + token * p.v_stride;
  T* q_out = static_cast<T*>(p.q_out) + token * q_heads * head_dim;

  // Head h of the token's slot lies at `slot_offset` + h * head_stride of a pool.
  const int64_t page = slot / p.page_size, offset = slot % p.page_size;
  const int64_t slot_offset = (page * kv_heads * p.page_size + offset) * head_dim;
  const int64_t head_stride = p.page_size * head_dim;
  T* k_out = static_cast<T*>(p.k_pages) + slot_offset;
  T* v_out = static_cast<T*>(p.v_pages) + slot_offset;

  const int per_head = head_dim - half; // pairs and the rest
  const int heads = slot < 0 ? q_heads : q_heads + kv_heads;
  for (int item = threadIdx.x; item < heads * per_head; item += kThreads) {
    const int head = item / per_head, i = item % per_head;
    const bool is_q = head < q_heads;
    const int64_t kv_head = head - q_heads;
    const T* in = is_q ? q + head * head_dim : k + kv_head * head_dim;
    T* out = is_q ? q_out + head * head_dim : k_out + kv_head * head_stride;
    if (i < half) {
      const float a = to_float(in[i]), b = to_float(in[i + half]);
      out[i] = from_float<T>(a * cos[i] - b * sin[i]);
      out[i + half] = from_float<T>(b * cos[i] + a * sin[i]);
    } else {
      out[i + half] = in[i + half];
    }
  }
  if (slot < 0)
    return;
  for (int item = threadIdx.x; item < kv_heads * head_dim; item += kThreads)
    v_out[item / head_dim * head_stride + item % head_dim] = v[item];
}

} // namespace

const char* rope_write_kv(const RopeWriteKvParams& p, void* stream) {
  if (p.tokens == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) {
    return launch(rotate_and_store<decltype(element)>, dim3(static_cast<unsigned>(p.tokens)), kThreads, 0, on,
                  p);
  });
}

} // namespace fastdllm::cuda
