// A CUDA device. A call on every set of data is captured once as a graph; CUDA events around a launch of that
// graph, so that neither the host nor the gaps between launches are in the time.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "backend.h"
#include "cuda/kernels.h"

namespace fastdllm::bench {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(cudaGetErrorString(error));
}
void check(const char* error) {
  if (error)
    throw std::runtime_error(error);
}

// A graph that can be launched, with the events around it.
struct Recording {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  ~Recording() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
  }
};

class Cuda final : public Backend {
public:
  Cuda() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  const char* name() const override { return "cuda"; }
  int64_t cache_bytes() const override {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
    return bytes;
  }
  int64_t largest_set() const override {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    return std::min<int64_t>(int64_t{9} << 30, static_cast<int64_t>(free / 8));
  }
  std::shared_ptr<void> allocate(int64_t bytes) override {
    void* data = nullptr;
    check(cudaMalloc(&data, static_cast<size_t>(bytes)));
    return {data, cudaFree};
  }
  void upload(void* to, const void* from, int64_t bytes) override {
    check(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
    check(cudaDeviceSynchronize());
  }
  void copy(void* to, const void* from, int64_t bytes) override {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_));
  }
  Timer timer(const Call& call, int sets) override {
    call(0); // loads the kernels: not while capturing
    check(cudaStreamSynchronize(stream_));
    auto recording = std::make_shared<Recording>();
    check(cudaEventCreate(&recording->begin));
    check(cudaEventCreate(&recording->end));
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int set = 0; set < sets; ++set)
      call(set);
    check(cudaStreamEndCapture(stream_, &recording->graph));
    check(cudaGraphInstantiate(&recording->exec, recording->graph, 0));
    const Timer measure = [this, sets, recording] {
      check(cudaEventRecord(recording->begin, stream_));
      check(cudaGraphLaunch(recording->exec, stream_));
      check(cudaEventRecord(recording->end, stream_));
      check(cudaEventSynchronize(recording->end));
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, recording->begin, recording->end));
      return milliseconds / 1e3 / sets;
    };
    for (int i = 0; i < 3; ++i)
      measure();
    return measure;
  }

  void run(const RopeWriteKvParams& p) override { check(cuda::rope_write_kv(p, stream_)); }
  void run(const PagedAttentionParams& p) override { check(cuda::paged_attention(p, stream_)); }
  void run(const UnmaskParams& p) override { check(cuda::unmask(p, stream_)); }
  void run(const RmsNormParams& p) override { check(cuda::rms_norm(p, stream_)); }
  void run(const SiluMulParams& p) override { check(cuda::silu_mul(p, stream_)); }
  void run(const CopyPagesParams& p) override { check(cuda::copy_pages(p, stream_)); }

  int64_t scratch(const PagedAttentionParams& p) override { return cuda::paged_attention_scratch(p); }
  int64_t scratch(const UnmaskParams& p) override { return cuda::unmask_partials(p); }

private:
  cudaStream_t stream_ = nullptr;
};

} // namespace

std::unique_ptr<Backend> make_cuda() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
    return nullptr;
  return std::make_unique<Cuda>();
}

} // namespace fastdllm::bench
