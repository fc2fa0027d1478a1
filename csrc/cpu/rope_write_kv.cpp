// q_out = rotate(q), k_pages[slot] = rotate(k), v_pages[slot] = v, for every token, where
//   rotate(x) = [a cos - b sin, b cos + a sin, rest],  x = [a | b | rest],  a and b rotary_dim / 2 long.
//
// q [tokens, q_heads, head_dim], k and v [tokens, kv_heads, head_dim], strided between tokens; cos and sin
// [positions, rotary_dim / 2] float32; q_out [tokens, q_heads, head_dim]; pages
// [pages, kv_heads, page_size, head_dim], where slot s is row s % page_size of page s / page_size.
//
// With scales, pages hold e4m3 numbers: of a rotated key or a value x, s = fp8_scale(max |x|) and
// to_fp8(x / s), x in float32.
//
// Bytes: q, k and v read once and written once, and one row of cos and sin a token.
// Work: an item is a token. Lanes run over the dims of a half.
// Arithmetic in float32 without contraction, rounded once: the same bits on every instruction set.
// Assumes: rotary_dim even and at most head_dim; slots distinct; a negative slot stores neither k nor v.
#include "cpu/fp8.h"
#include "cpu/kernels.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr int64_t kMostDims = 256;

template <class T> inline void copy(const T* from, T* to, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(T));
}
inline void copy(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_up_to(to + i, n - i, load_up_to(from + i, n - i));
}

// `out` holds T or float32.
template <class T, class Out>
inline void rotate(const T* x, Out* out, const float* cos, const float* sin, int64_t half, int64_t head_dim) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F32 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, a * c - b * s);
    store(out + half + i, b * c + a * s);
  }
  if (const int64_t n = half - i; n > 0) {
    const F32 a = load_first(x + i, n), b = load_first(x + half + i, n);
    const F32 c = load_first(cos + i, n), s = load_first(sin + i, n);
    store_first(out + i, n, a * c - b * s);
    store_first(out + half + i, n, b * c + a * s);
  }
  copy(x + 2 * half, out + 2 * half, head_dim - 2 * half);
}

template <class T> void write_tokens(const RopeWriteKvParams& p, int64_t begin, int64_t end) {
  const int64_t half = p.rotary_dim / 2, d = p.head_dim;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = p.cos + p.positions[token] * half;
    const float* sin = p.sin + p.positions[token] * half;
    const T* q = static_cast<const T*>(p.q) + token * p.q_stride;
    T* q_out = static_cast<T*>(p.q_out) + token * p.q_heads * d;
    for (int64_t head = 0; head < p.q_heads; ++head)
      rotate(q + head * d, q_out + head * d, cos, sin, half, d);

    const int64_t slot = p.slots[token];
    if (slot < 0)
      continue;
    const T* k = static_cast<const T*>(p.k) + token * p.k_stride;
    const T* v = static_cast<const T*>(p.v) + token * p.v_stride;
    const int64_t page = slot / p.page_size, row = slot % p.page_size;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const int64_t vector = (page * p.kv_heads + head) * p.page_size + row, at = vector * d;
      if (p.k_scales) {
        float x[kMostDims];
        rotate(k + head * d, x, cos, sin, half, d);
        p.k_scales[vector] = quantise(x, static_cast<Fp8*>(p.k_pages) + at, d);
        p.v_scales[vector] = quantise(v + head * d, static_cast<Fp8*>(p.v_pages) + at, d);
      } else {
        rotate(k + head * d, static_cast<T*>(p.k_pages) + at, cos, sin, half, d);
        copy(v + head * d, static_cast<T*>(p.v_pages) + at, d);
      }
    }
  }
}

} // namespace

void rope_write_kv(const RopeWriteKvParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    write_tokens<float>(p, begin, end);
  else
    write_tokens<BFloat16>(p, begin, end);
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
