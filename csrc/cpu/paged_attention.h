// What the inner loops of paged_attention share: the work list and where rows and keys lie.
// For files compiled once for each instruction set, as simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/multiply.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kMinusInfinity = -__builtin_inff();

// Rows [first_row, first_row + rows) of one sequence and KV head; a row is (query, head of the group), the
// head running faster.
struct Item {
  int64_t kv_head, group, first_query, first_row, rows, keys;
  const int32_t* pages;
};

inline Item item_at(const PagedAttentionParams& p, int64_t index) {
  const int64_t tiles = paged_attention_items(p) / (p.sequences * p.kv_heads);
  const int64_t sequence = index / tiles / p.kv_heads;
  Item t;
  t.kv_head = index / tiles % p.kv_heads;
  t.group = p.q_heads / p.kv_heads;
  t.first_query = p.cu_seqlens_q[sequence];
  t.first_row = index % tiles * kAttentionTileRows;
  t.rows = min(kAttentionTileRows, (p.cu_seqlens_q[sequence + 1] - t.first_query) * t.group - t.first_row);
  t.keys = p.kv_lens[sequence];
  t.pages = p.block_table + sequence * p.max_blocks;
  return t;
}

// Where row r of the item begins in q and out, in elements.
inline int64_t row_offset(const PagedAttentionParams& p, const Item& t, int64_t r) {
  const int64_t query = t.first_query + (t.first_row + r) / t.group;
  const int64_t head = t.kv_head * t.group + (t.first_row + r) % t.group;
  return (query * p.q_heads + head) * p.head_dim;
}

// Where key j of a KV head begins in k_pages and v_pages, in elements.
inline int64_t key_offset(const PagedAttentionParams& p, const Item& t, int64_t head, int64_t j) {
  const int64_t page = t.pages[j / p.page_size];
  return ((page * p.kv_heads + head) * p.page_size + j % p.page_size) * p.head_dim;
}

// Whether pages hold fp8 numbers, with scales.
template <class Stored> constexpr bool is_fp8 = false;
template <> constexpr bool is_fp8<Fp8> = true;

// The scales of n keys from a multiple of the page size on, and of as many more as fill 16.
inline void gather_scales(const PagedAttentionParams& p, const Item& t, int64_t key, int64_t n, float* k,
                          float* v) {
  constexpr int64_t kTogether = 16; // keys, that lie in one page
  for (int64_t j = 0; j < n; j += kTogether) {
    const int64_t at = key_offset(p, t, t.kv_head, key + j) / p.head_dim;
    __builtin_memcpy(k + j, p.k_scales + at, kTogether * sizeof(float));
    __builtin_memcpy(v + j, p.v_scales + at, kTogether * sizeof(float));
  }
}

} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
