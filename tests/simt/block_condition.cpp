// Asks for the condition of the loop of a block (csrc/cuda/block_condition.h), for tests/test_block_loop.py.
#include "cuda/block_condition.h"

namespace fastdllm::cuda {
namespace {

void ask(const RowState* rows, int64_t count, int64_t* iterations, int64_t cap, int64_t* answers) {
  answers[threadIdx.x] = goes_on(rows, count, iterations, cap);
}

} // namespace
} // namespace fastdllm::cuda

// answers: [kWarp], of each lane.
extern "C" __attribute__((visibility("default"))) const char* simt_goes_on(const fastdllm::RowState* rows,
                                                                           int64_t count, int64_t* iterations,
                                                                           int64_t cap, int64_t* answers) {
  using namespace fastdllm::cuda;
  return launch(ask, dim3(1), kWarp, 0, nullptr, rows, count, iterations, cap, answers);
}
