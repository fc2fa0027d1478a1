// What the build holds for CUDA.
#include <cuda_runtime.h>

#include "cuda/kernels.h"

#ifndef FASTDLLM_CUDA_ARCHS
#error "FASTDLLM_CUDA_ARCHS must list the architectures, as a string"
#endif

namespace fastdllm::cuda {

bool built() { return true; }
const char* architectures() { return FASTDLLM_CUDA_ARCHS; }
int runtime_version() { return CUDART_VERSION; }

} // namespace fastdllm::cuda
