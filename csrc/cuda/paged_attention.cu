// paged_attention: out = softmax(scale q K^T) V, bidirectional, over the pages of each sequence.
//
//   q, out             [tokens, q_heads, head_dim]
//   k_pages, v_pages   [pages, kv_heads, page_size, head_dim]
//   block_table [sequences, max_blocks], kv_lens [sequences], cu_seqlens_q [sequences + 1]
//
// A warp takes one query head of one query token and walks over the keys, kKeys at a time, with an online
// softmax in float32. A lane holds dimensions lane, lane + 32, ... of q and of the output; a score is a sum
// over the warp. Bytes: K and V of a sequence once per query head and token, out of the L2 cache mostly (the
// floor is once per KV head).
//
// Assumes q_heads % kv_heads == 0 and head_dim <= 256. Keys at kv_lens[b] and after are never read. A
// sequence without keys, and a token outside all sequences, get zeros. No atomics and no split over keys: the
// bits of a token depend on its own sequence alone.
#include <cmath>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kWarps = 4; // a block
constexpr int kKeys = 4;  // scored together, to have several loads in flight

// kPerLane * 32 >= head_dim
template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp, 6) attend(PagedAttentionParams p) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (item >= p.tokens * p.q_heads)
    return;
  const int lane = threadIdx.x % kWarp, head_dim = static_cast<int>(p.head_dim);
  const int64_t token = item / p.q_heads, kv_head = item % p.q_heads / (p.q_heads / p.kv_heads);
  const int64_t b = sequence_of(token, p.cu_seqlens_q, p.sequences);
  const int64_t kv_len = b < 0 ? 0 : p.kv_lens[b];
  T* out = static_cast<T*>(p.out) + item * head_dim;

  float q[kPerLane], o[kPerLane];
  const T* q_row = static_cast<const T*>(p.q) + item * head_dim;
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + i * kWarp;
    q[i] = d < head_dim ? p.scale * to_float(q_row[d]) : 0.0f;
    o[i] = 0;
  }

  float largest = -kLargest, sum = 0;
  for (int64_t block = 0; block * p.page_size < kv_len; ++block) {
    const int64_t page = p.block_table[b * p.max_blocks + block];
    const int64_t base = (page * p.kv_heads + kv_head) * p.page_size * head_dim;
    const T* keys = static_cast<const T*>(p.k_pages) + base;
    const T* values = static_cast<const T*>(p.v_pages) + base;
    const int64_t left = kv_len - block * p.page_size;
    const int count = static_cast<int>(left < p.page_size ? left : p.page_size);
    for (int first = 0; first < count; first += kKeys) {
      float s[kKeys];
      for (int j = 0; j < kKeys; ++j) {
        s[j] = 0;
        if (first + j < count)
          for (int i = 0; i < kPerLane; ++i) {
            const int d = lane + i * kWarp;
            if (d < head_dim)
              s[j] += q[i] * to_float(keys[(first + j) * head_dim + d]);
          }
      }
      float top = largest;
      for (int j = 0; j < kKeys; ++j) {
        s[j] = first + j < count ? warp_reduce(s[j], Sum{}) : -INFINITY;
        top = fmaxf(top, s[j]);
      }
      const float shrink = expf(largest - top);
      largest = top;
      sum *= shrink;
      for (int i = 0; i < kPerLane; ++i)
        o[i] *= shrink;
      for (int j = 0; j < kKeys && first + j < count; ++j) {
        const float weight = expf(s[j] - largest);
        sum += weight;
        for (int i = 0; i < kPerLane; ++i) {
          const int d = lane + i * kWarp;
          if (d < head_dim)
            o[i] += weight * to_float(values[(first + j) * head_dim + d]);
        }
      }
    }
  }
  const float normalizer = kv_len > 0 ? 1.0f / sum : 0.0f;
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + i * kWarp;
    if (d < head_dim)
      out[d] = from_float<T>(o[i] * normalizer);
  }
}

template <class T> const char* attend_all(const PagedAttentionParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.tokens * p.q_heads + kWarps - 1) / kWarps);
  if (p.head_dim <= 64)
    return launch(attend<T, 2>, dim3(blocks), kWarps * kWarp, 0, stream, p);
  if (p.head_dim <= 128)
    return launch(attend<T, 4>, dim3(blocks), kWarps * kWarp, 0, stream, p);
  return launch(attend<T, 8>, dim3(blocks), kWarps * kWarp, 0, stream, p);
}

} // namespace

const char* paged_attention(const PagedAttentionParams& p, void* stream) {
  if (p.head_dim > 256)
    return "head_dim is above 256";
  if (p.tokens == 0 || p.q_heads == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) { return attend_all<decltype(element)>(p, on); });
}

} // namespace fastdllm::cuda
