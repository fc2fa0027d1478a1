// Is each kernel near its floor? GB/s (bytes that must move over the time) and the share of what a plain
// copy, measured first in the same run, reaches. See `make bench-cpp`.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "cpu/kernels.h"
#include "operations.h"

namespace fastdllm::bench {
namespace {

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
  return x[x.size() / 2];
}

// Bytes a second, read and written.
double copy_rate(Backend& backend) {
  const int64_t bytes = std::clamp<int64_t>(2 * backend.cache_bytes(), int64_t{1} << 28, int64_t{1} << 30);
  const auto from = backend.allocate(bytes), to = backend.allocate(bytes);
  // Memory that was never written is one page of zeros, which a cache holds.
  std::vector<uint32_t> noise(1 << 20);
  std::generate(noise.begin(), noise.end(), std::mt19937(0));
  const auto piece = static_cast<int64_t>(noise.size() * sizeof(noise[0]));
  for (int64_t at = 0; at < bytes; at += piece)
    backend.upload(static_cast<char*>(from.get()) + at, noise.data(), std::min(piece, bytes - at));
  const Timer timer = backend.timer([&](int) { backend.copy(to.get(), from.get(), bytes); }, 2);
  std::vector<double> seconds;
  for (int i = 0; i < 11; ++i)
    seconds.push_back(timer());
  return 2.0 * bytes / median(seconds);
}

// What runs now; Google Benchmark calls the function of a benchmark several times over.
struct {
  std::string name;
  Case data;
  Timer timer;
} current;

void run(benchmark::State& state, const std::string& name, Backend& backend, const Operation& operation,
         double copy_rate) {
  try {
    if (current.name != name) {
      current = {};
      current.data = operation.make(backend);
      current.timer = backend.timer(current.data.call, current.data.sets);
      current.name = name;
    }
    std::vector<double> seconds;
    for (auto _ : state) {
      seconds.push_back(current.timer());
      state.SetIterationTime(seconds.back());
    }
    const double rate = operation.bytes / median(seconds);
    state.counters["GB/s"] = rate / 1e9;
    state.counters["of_copy"] = rate / copy_rate;
  } catch (const std::exception& error) {
    state.SkipWithError(error.what());
  }
}

void add(Backend& backend) {
  const double rate = copy_rate(backend);
  benchmark::AddCustomContext(std::string(backend.name()) + " copy, GB/s", std::to_string(rate / 1e9));
  for (const Operation& operation : operations()) {
    if (operation.set_bytes > backend.largest_set())
      continue;
    const std::string name = std::string(backend.name()) + '/' + operation.name;
    benchmark::RegisterBenchmark(name.c_str(),
                                 [name, &backend, operation, rate](benchmark::State& state) {
                                   run(state, name, backend, operation, rate);
                                 })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
}

} // namespace
} // namespace fastdllm::bench

int main(int argc, char** argv) {
  using namespace fastdllm;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  benchmark::AddCustomContext("instruction set", cpu::kernels().isa);
  const auto on_cpu = bench::make_cpu();
  bench::add(*on_cpu);
#ifdef FASTDLLM_WITH_CUDA
  const auto on_cuda = bench::make_cuda();
  if (on_cuda)
    bench::add(*on_cuda);
#endif
  benchmark::RunSpecifiedBenchmarks();
  bench::current = {}; // before its backend
  benchmark::Shutdown();
  return 0;
}
