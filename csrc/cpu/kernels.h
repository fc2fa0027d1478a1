// The CPU kernels. Each is written once and compiled for several instruction sets (namespace FASTDLLM_ISA);
// kernels() is the table of the set in use. A kernel works on items [begin, end) of its work list, so that
// the caller splits the list over torch's own threads; items are independent and give the same bits
// whatever the split.
#pragma once

#include "core/params.h"

namespace fastdllm::cpu {

struct Kernels {
  const char* isa;
  void (*rope_write_kv)(const RopeWriteKvParams&, int64_t begin, int64_t end);
  void (*paged_attention)(const PagedAttentionParams&, int64_t begin, int64_t end);
  void (*score_logits)(const UnmaskParams&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormParams&, int64_t begin, int64_t end);         // items: rows
  void (*silu_mul)(const SiluMulParams&, int64_t begin, int64_t end);         // items: rows
  void (*quantize_fp8)(const QuantizeFp8Params&, int64_t begin, int64_t end); // items: rows
  void (*linear)(const LinearParams&, int64_t begin, int64_t end);
};

// Work items of each kernel.
inline int64_t rope_write_kv_items(const RopeWriteKvParams& p) { return p.tokens; }
int64_t paged_attention_items(const PagedAttentionParams& p);
inline int64_t score_logits_items(const UnmaskParams& p) { return p.logit_rows; }
int64_t linear_items(const LinearParams& p); // chunks of rows of x, each as often as there are
int64_t linear_bands(const LinearParams& p); // pairs of bands of the weight

// The query tile of paged_attention: rows of (query, head of the group) that share a pass over the keys.
inline constexpr int64_t kAttentionTileRows = 64;
// An item of linear is two bands of so many rows of the weight: where gated one of the gate's and one of the
// up's, else neighbours.
inline constexpr int64_t kLinearBandRows = 16;
// The most rows of x that linear multiplies as fast as torch's matrix multiplication, which is for many.
inline int64_t linear_rows(Dtype dtype) { return dtype == Dtype::kFloat32 ? 64 : 128; }

// Memory of the calling thread, 64-byte aligned, grown on demand and kept; what it holds is lost on return.
void* scratch(int64_t bytes);

// unmask = filter, where there is one, and score_logits over all rows of logits, then commit over all
// sequences.
void filter(const UnmaskParams& p, int64_t begin, int64_t end);
void commit(const UnmaskParams& p, int64_t begin, int64_t end);
void copy_pages(const CopyPagesParams& p, int64_t begin, int64_t end); // items: pairs * outer

// Instruction sets that were compiled in and that this CPU has, the best one last.
const Kernels& kernels();
int isa_count();
const char* isa_name(int index);
bool set_isa(const char* name); // false where the set is not there

} // namespace fastdllm::cpu
