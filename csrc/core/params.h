// One parameter struct an operation: what a launcher on either side (csrc/cpu, csrc/cuda) takes.
// Pointers are to the device of the launcher; strides count elements. Nothing here owns memory.
#pragma once

#include <cstdint>

namespace fastdllm {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

// Rotates q and k (half-split RoPE over the first rotary_dim of head_dim) and stores k and v into pages.
//   q' = [a cos - b sin, b cos + a sin],  a = q[: rotary_dim / 2],  b = q[rotary_dim / 2 : rotary_dim]
// Arithmetic in float32, rounded once. A slot is page * page_size + offset; a negative slot stores nothing.
// With scales, pages hold e4m3 numbers (core/fp8.h): of each head's vector x the scale s = fp8_scale(max
// |x|), and to_fp8(x / s), x being what would be rounded to the dtype. Where s is NaN they may be any
// numbers.
struct RopeWriteKvParams {
  const void* q;            // [tokens, q_heads, head_dim], heads contiguous, q_stride between tokens
  const void* k;            // [tokens, kv_heads, head_dim], likewise
  const void* v;            // [tokens, kv_heads, head_dim], likewise
  const float* cos;         // [positions, rotary_dim / 2]
  const float* sin;         // [positions, rotary_dim / 2]
  const int64_t* positions; // [tokens]
  const int64_t* slots;     // [tokens]
  void* q_out;              // [tokens, q_heads, head_dim] contiguous
  void* k_pages;            // [pages, kv_heads, page_size, head_dim] contiguous
  void* v_pages;            // [pages, kv_heads, page_size, head_dim] contiguous
  float* k_scales;          // [pages, kv_heads, page_size], or nullptr: pages hold the dtype
  float* v_scales;          // likewise
  int64_t tokens, q_heads, kv_heads, head_dim, rotary_dim, page_size;
  int64_t q_stride, k_stride, v_stride;
  Dtype dtype;
};

// out = softmax(scale q K^T) V for every query of every sequence, over all kv_lens[b] positions of the
// sequence's pages: bidirectional, no mask. Query head h reads KV head h / (q_heads / kv_heads).
// A sequence with kv_lens[b] == 0 gets zeros. Slots past kv_lens[b] may hold anything, NaN included.
// With scales, pages hold e4m3 numbers (core/fp8.h), as elements of the dtype exact: the score of a key is
// multiplied with its scale, and once they are summed up, its weight with that of its value. Scales may be
// NaN. A NaN of e4m3 itself, which rope_write_kv stores only beside such a scale, is read as 480.
struct PagedAttentionParams {
  const void* q;               // [tokens, q_heads, head_dim] contiguous
  const void* k_pages;         // [pages, kv_heads, page_size, head_dim] contiguous
  const void* v_pages;         // [pages, kv_heads, page_size, head_dim] contiguous
  const float* k_scales;       // [pages, kv_heads, page_size], or nullptr: pages hold the dtype
  const float* v_scales;       // likewise
  const int32_t* block_table;  // [sequences, max_blocks]: page of each page_size positions
  const int32_t* kv_lens;      // [sequences]
  const int32_t* cu_seqlens_q; // [sequences + 1]: queries of b are [cu[b], cu[b + 1])
  void* out;                   // [tokens, q_heads, head_dim] contiguous
  float* scratch;              // CUDA: for the partial results of keys that are split over blocks
  int64_t tokens, sequences, max_blocks, max_seqlen_q;
  int64_t q_heads, kv_heads, head_dim, page_size;
  float scale;
  Dtype dtype;
};

// out = weight * (x / sqrt(mean x^2 + eps)) for every row, statistics in float32, the normalised value and
// the product each rounded to the dtype. Where there is a residual, first residual += x, rounded, and the
// norm is that of the residual.
struct RmsNormParams {
  const void* x;      // [rows, hidden], x_stride between rows
  void* residual;     // [rows, hidden] contiguous, or nullptr
  const void* weight; // [hidden]
  void* out;          // [rows, hidden] contiguous
  int64_t rows, hidden, x_stride;
  float eps;
  Dtype dtype;
};

// out = silu(gate) * up, silu(x) = x / (1 + exp(-x)) in float32; silu and the product each rounded.
struct SiluMulParams {
  const void* gate; // [rows, columns], gate_stride between rows
  const void* up;   // [rows, columns], up_stride between rows
  void* out;        // [rows, columns] contiguous
  int64_t rows, columns, gate_stride, up_stride;
  Dtype dtype;
};

// out = x weight^T + bias, summed in float32 and rounded once. Where gated, out = silu(gate) * up of the gate
// and up that the two halves of the weight give, each rounded; silu and the product are rounded again.
// Where there are scales, the weight is int8, and row j of it stands for scales[j] times its numbers.
struct LinearParams {
  const void* x;       // [rows, k], x_stride between rows
  const void* weight;  // [n, k], weight_stride between rows; gated: [2 n, k], the gate's rows, then the up's
  const float* scales; // [n], gated: [2 n], or nullptr
  const void* bias;    // [n], gated: [2 n], or nullptr
  void* out;           // [rows, n] contiguous
  int64_t rows, n, k, x_stride, weight_stride;
  bool gated;
  Dtype dtype; // of x, bias and out
};

// values = x / scale, each rounded to e4m3fn (core/fp8.h), scale = max |x| / 448 of every row. A NaN or an
// infinity makes the scale one, and so every product with it.
struct QuantizeFp8Params {
  const void* x;   // [rows, k], x_stride between rows
  uint8_t* values; // [rows, k] contiguous
  float* scales;   // [rows]
  int64_t rows, k, x_stride;
  Dtype dtype; // of x
};

// Copies page src[i] over page dst[i] in every one of `outer` pools that lie outer_stride_bytes apart.
struct CopyPagesParams {
  void* pages;
  const int64_t* src; // [pairs]
  const int64_t* dst; // [pairs], distinct, none of them a source
  int64_t pairs, outer, outer_stride_bytes, page_bytes;
};

enum class Rule : int64_t { kQuota, kThreshold, kFactor, kFrechet, kEntropyBound };
// What a position is ranked by, up to the noise of rank_temperature, and what is stored as its confidence.
// With p the softmax over the kept tokens:
enum class Score : int64_t {
  kProbability, // p of the candidate
  kRandom,      // uniform noise
  kMargin,      // the largest p minus the second, among the candidates
  kEntropy,     // sum p log p, the negative entropy
};

// The decoding state of one sequence: one row of the int64 tensor `rows` of unmask, in this order.
struct RowState {
  int64_t rule;       // Rule
  int64_t score;      // Score: what a position is ranked by
  int64_t seed;       // Philox key
  int64_t stream;     // Philox counter word: the sequence's own stream
  int64_t first;      // first generated position
  int64_t end;        // one past the last generated position
  int64_t step;       // forwards taken so far, +1 by unmask
  int64_t block_step; // forwards taken in this block, +1 by unmask
  int64_t masks_left; // masks in the block now, lowered by unmask
  int64_t eos_at;     // out: position of the EOS that finishes the row, else -1
  int64_t bad_logits; // out: masked rows with NaN, +inf or no finite candidate; then nothing is committed
  int64_t arrivals;   // 0 between calls: the CUDA kernel counts its blocks here
};
inline constexpr int64_t kRowFields = sizeof(RowState) / sizeof(int64_t);

// One row of the float32 tensor `knobs` of unmask.
struct RowKnobs {
  float value;               // threshold, factor or bound
  float temperature;         // of the noise that candidates are sampled with; 0: greedy
  float softmax_temperature; // what confidence divides the logits by; 0 is taken as 1
  float top_p;               // 0 and 1: off
  float top_k;               // 0: off
  float rank_temperature;    // of the noise that positions are ranked with; 0: none
};
inline constexpr int64_t kRowKnobs = sizeof(RowKnobs) / sizeof(float);

// Confidence, candidate, selection, commit, masks left and EOS for every sequence that has rows of logits.
// Row r of the logits belongs to position positions[r] of its sequence. Where that holds no mask the row is
// ignored: not read, not ranked, not bad. So all positions of a block may be given on every step, as a CUDA
// graph needs it. A sequence without rows, or with ignored ones only, is left alone.
//   kept       every token v with l_v >= floor; with z = l / softmax_temperature, the floor is the larger of
//                top-p: the least l_v such that sum over { l_u > l_v } of softmax(z)_u <= top_p
//                top-k: the least l_v such that fewer than top_k tokens have a larger logit
//              but at most the best candidate's logit. Equal logits stay or go together, so no order of
//              sorting matters. The mask counts as any token here.
//   candidate  x = argmax over kept v != mask_id of l_v (T = 0) or l_v / T + g_v (T > 0); ties: the lowest id
//   score      c by Score, from p = softmax of z over the kept tokens, mask_id included
//   key        k = c (rank_temperature R = 0) or c / R + g with Gumbel noise g of the position (R > 0)
//   commit     the positions that the rule selects by (k descending, position ascending); at least one
struct UnmaskParams {
  const void* logits;       // [logit_rows, vocab], logits_stride between rows
  const int32_t* cu_rows;   // [sequences + 1]: logits rows of sequence b are [cu[b], cu[b + 1])
  const int64_t* positions; // [logit_rows], ascending within a sequence
  int64_t* tokens;          // [sequences, width]
  int32_t* step_map;        // [sequences, width]: `step` before the call, at committed positions
  float* confidence;        // [sequences, width]: c, at committed positions
  RowState* rows;           // [sequences]
  const RowKnobs* knobs;    // [sequences]
  const int32_t* quotas;    // [sequences, quota_steps]: masks that each step of the block fills (quota)
  const int64_t* eos_ids;   // [eos_count], may be empty
  int32_t* candidate;       // scratch [logit_rows]
  float* score;             // scratch [logit_rows]: c, NaN where the logits are bad or ignored
  float* floor;             // scratch [logit_rows], or nullptr: every token of every row is kept
  float* partials;          // CUDA: scratch for the parts of rows that are split over blocks
  int64_t logit_rows, sequences, vocab, width, logits_stride, quota_steps, eos_count, mask_id;
  Dtype dtype; // of the logits
};

} // namespace fastdllm
