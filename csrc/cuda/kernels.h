// The CUDA launchers. `stream` is a cudaStream_t of the current device. Each returns nullptr, or the text
// of the CUDA error. Without CUDA in the build they return a text that says so (no_cuda.cpp).
#pragma once

#include "core/params.h"

namespace fastdllm::cuda {

bool built();
const char* architectures();
int runtime_version(); // of the toolkit, as CUDART_VERSION; 0 without CUDA

const char* rope_write_kv(const RopeWriteKvParams& p, void* stream);
const char* paged_attention(const PagedAttentionParams& p, void* stream);
int64_t paged_attention_scratch(const PagedAttentionParams& p); // floats that p.scratch has to have
const char* unmask(const UnmaskParams& p, void* stream);
int64_t unmask_partials(const UnmaskParams& p); // floats that p.partials has to have
const char* rms_norm(const RmsNormParams& p, void* stream);
const char* silu_mul(const SiluMulParams& p, void* stream);
const char* quantize_fp8(const QuantizeFp8Params& p, void* stream);
const char* copy_pages(const CopyPagesParams& p, void* stream);

} // namespace fastdllm::cuda
