// When a block goes on without the host: the condition of the WHILE node of block_loop.cu, by one warp.
#pragma once

#include "cuda/device.h"

namespace fastdllm::cuda {

// Its block is filled, an EOS finishes it, or its logits were bad. A row that only fills up a batch of fixed
// size says that it has masks left, and its tokens hold none: unmask leaves it alone, and it asks for
// nothing.
__device__ __forceinline__ bool needs_host(const RowState& row) {
  return row.masks_left <= 0 || row.eos_at >= 0 || row.bad_logits != 0;
}

// Counts the iteration that is over; whether there is to be another one.
__device__ __forceinline__ bool goes_on(const RowState* rows, int64_t count, int64_t* iterations,
                                        int64_t cap) {
  bool stop = false;
  for (int64_t b = threadIdx.x; b < count; b += kWarp)
    stop = needs_host(rows[b]) || stop;
  const int64_t taken = *iterations + 1;
  stop = __ballot_sync(kAllLanes, stop) != 0; // all lanes have read the count
  if (threadIdx.x == 0)
    *iterations = taken;
  return !stop && taken < cap;
}

} // namespace fastdllm::cuda
