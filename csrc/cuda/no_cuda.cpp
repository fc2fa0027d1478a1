// Stands in for the CUDA kernels in a build without them.
#include <stdexcept>

#include "cuda/block_loop.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr const char* kNoCuda = "this build of fastdllm_ext has no CUDA kernels; install it where nvcc is "
                                "found (or with FASTDLLM_CUDA=ON)";

} // namespace

bool built() { return false; }
const char* architectures() { return ""; }
int runtime_version() { return 0; }

const char* rope_write_kv(const RopeWriteKvParams&, void*) { return kNoCuda; }
const char* paged_attention(const PagedAttentionParams&, void*) { return kNoCuda; }
int64_t paged_attention_scratch(const PagedAttentionParams&) { return 0; }
const char* unmask(const UnmaskParams&, void*) { return kNoCuda; }
int64_t unmask_partials(const UnmaskParams&) { return 0; }
const char* rms_norm(const RmsNormParams&, void*) { return kNoCuda; }
const char* silu_mul(const SiluMulParams&, void*) { return kNoCuda; }
const char* quantize_fp8(const QuantizeFp8Params&, void*) { return kNoCuda; }
const char* copy_pages(const CopyPagesParams&, void*) { return kNoCuda; }

struct BlockLoop::Graph {};
BlockLoop::BlockLoop(void*, const RowState*, int64_t, int64_t*, int64_t) {
  throw std::runtime_error(kNoCuda);
}
BlockLoop::~BlockLoop() = default;
void BlockLoop::launch(void*) {}

} // namespace fastdllm::cuda
