// Where the kernels run: memory, copies, launches and time, for the CPU and for a CUDA device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/params.h"

namespace fastdllm::bench {

using Call = std::function<void(int set)>; // works on one of several equal sets of data
using Timer = std::function<double()>;     // runs calls and returns the seconds of one

class Backend {
public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  virtual int64_t cache_bytes() const = 0; // of the last level
  virtual int64_t largest_set() const = 0; // bytes of the largest set of data to measure with
  virtual std::shared_ptr<void> allocate(int64_t bytes) = 0;
  virtual void upload(void* to, const void* from, int64_t bytes) = 0; // out of the host's memory
  virtual void copy(void* to, const void* from, int64_t bytes) = 0;   // within this memory
  virtual Timer timer(const Call& call, int sets) = 0;

  virtual void run(const RopeWriteKvParams& p) = 0;
  virtual void run(const PagedAttentionParams& p) = 0;
  virtual void run(const UnmaskParams& p) = 0;
  virtual void run(const RmsNormParams& p) = 0;
  virtual void run(const SiluMulParams& p) = 0;
  virtual void run(const CopyPagesParams& p) = 0;

  // Floats of scratch memory that an operation has to be given.
  virtual int64_t scratch(const PagedAttentionParams& p) = 0;
  virtual int64_t scratch(const UnmaskParams& p) = 0;
};

std::unique_ptr<Backend> make_cpu();
std::unique_ptr<Backend> make_cuda(); // nullptr where there is no device

} // namespace fastdllm::bench
