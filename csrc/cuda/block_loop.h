// A whole block in one launch: a captured step, again and again on the device until the host is needed.
#pragma once

#include <cstdint>
#include <memory>

#include "core/params.h"

namespace fastdllm::cuda {

// An executable graph of the current device:
//   iterations = 0
//   do { step; ++iterations } while (no row needs the host, and iterations < cap)
// A row needs the host once its block is filled, an EOS finishes it or its logits were bad
// (block_condition.h). So at least one step is taken, whatever the rows say at launch.
//
// Everything that is wrong is a std::runtime_error with a text: a driver before CUDA 12.4, nodes of the step
// that a loop may not hold, errors of CUDA.
class BlockLoop {
public:
  // step        a cudaGraph_t, which is cloned; what its nodes read and write must outlive the loop
  // rows        [count] on the device: the decoding states that the step advances
  // iterations  on the device: how many steps the last launch took
  // cap         the most steps that a launch takes
  BlockLoop(void* step, const RowState* rows, int64_t count, int64_t* iterations, int64_t cap);
  ~BlockLoop();

  // On a cudaStream_t of the same device; returns at once. One launch at a time.
  void launch(void* stream);

private:
  struct Graph;
  std::unique_ptr<Graph> graph_;
};

} // namespace fastdllm::cuda
