// Kernels with one mistake each, which the emulator has to report (tests/test_ptx.py).
#include "cuda/ptx.h"

namespace fastdllm::cuda {
namespace {

struct alignas(16) Shared {
  float x[128];
  uint64_t barrier;
};

void mistake_missing_thread() {
  if (threadIdx.x != 5)
    __syncthreads();
  else
    simt::wait_turn();
}
void mistake_diverged_collective() {
  if (threadIdx.x == 3)
    __ballot_sync(kAllLanes, 1);
  else
    __syncwarp();
}
void mistake_unaligned_copy() { cp_async_16(&shared_memory<Shared>().x[1], &shared_memory<Shared>(), true); }
void mistake_copy_outside() { cp_async_16(&shared_memory<Shared>() + 1, &shared_memory<Shared>(), true); }
void mistake_write_behind() { (&shared_memory<Shared>())[1].x[8] = 1; }
void mistake_forgotten_wait() {
  alignas(16) static const float zeros[4] = {};
  for (int i = 0; i < 32; ++i)
    cp_async_16(shared_memory<Shared>().x, zeros, true);
}
void mistake_barrier_never_comes() {
  uint64_t* barrier = &shared_memory<Shared>().barrier;
  if (threadIdx.x == 0)
    mbarrier_init(barrier, 1);
  __syncthreads();
  mbarrier_wait(barrier, 0);
}
void mistake_missing_barrier(float* out) {
  auto& x = shared_memory<Shared>().x;
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = x[(threadIdx.x + 33) % 128];
}

template <class... Args> const char* run(void (*kernel)(Args...), Args... args) {
  return launch(kernel, dim3(1), 128, sizeof(Shared), nullptr, args...);
}

} // namespace
} // namespace fastdllm::cuda

using namespace fastdllm::cuda;

#define FASTDLLM_MISTAKE(name)                                                                               \
  extern "C" __attribute__((visibility("default"))) const char* mistake_##name() {                           \
    return run(fastdllm::cuda::mistake_##name);                                                              \
  }
FASTDLLM_MISTAKE(missing_thread)
FASTDLLM_MISTAKE(diverged_collective)
FASTDLLM_MISTAKE(unaligned_copy)
FASTDLLM_MISTAKE(copy_outside)
FASTDLLM_MISTAKE(write_behind)
FASTDLLM_MISTAKE(forgotten_wait)
FASTDLLM_MISTAKE(barrier_never_comes)

extern "C" __attribute__((visibility("default"))) const char* mistake_missing_barrier(void* out) {
  return run(fastdllm::cuda::mistake_missing_barrier, static_cast<float*>(out));
}
