// The CPU: work lists split evenly over OpenMP's threads (OMP_NUM_THREADS), as torch's own pool does.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "backend.h"
#include "cpu/kernels.h"

namespace fastdllm::bench {
namespace {

template <class F> void parallel(int64_t items, const F& f) {
#ifdef _OPENMP
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    f(items * thread / threads, items * (thread + 1) / threads);
  }
#else
  f(int64_t{0}, items);
#endif
}

template <class Params>
void split(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t items) {
  parallel(items, [&](int64_t begin, int64_t end) {
    if (begin < end)
      kernel(p, begin, end);
  });
}

class Cpu final : public Backend {
public:
  const char* name() const override { return "cpu"; }
  int64_t cache_bytes() const override {
    constexpr int64_t kUnknown = 64 << 20;
    const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? bytes : kUnknown;
  }
  int64_t largest_set() const override {
    return std::min<int64_t>(int64_t{9} << 27,
                             int64_t{sysconf(_SC_AVPHYS_PAGES)} * sysconf(_SC_PAGESIZE) / 4);
  }
  std::shared_ptr<void> allocate(int64_t bytes) override {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!data)
      throw std::bad_alloc();
    return {data, std::free};
  }
  void upload(void* to, const void* from, int64_t bytes) override { std::memcpy(to, from, bytes); }
  void copy(void* to, const void* from, int64_t bytes) override {
    parallel(bytes, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
    });
  }
  Timer timer(const Call& call, int sets) override {
    for (int set = 0; set < std::min(sets, 2); ++set)
      call(set);
    return [call, sets, set = 1]() mutable {
      set = (set + 1) % sets;
      const auto start = std::chrono::steady_clock::now();
      call(set);
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
  }

  void run(const RopeWriteKvParams& p) override {
    split(cpu::kernels().rope_write_kv, p, cpu::rope_write_kv_items(p));
  }
  void run(const PagedAttentionParams& p) override {
    split(cpu::kernels().paged_attention, p, cpu::paged_attention_items(p));
  }
  void run(const UnmaskParams& p) override {
    split(cpu::kernels().score_logits, p, cpu::score_logits_items(p));
    split(cpu::commit, p, p.sequences);
  }
  void run(const RmsNormParams& p) override { split(cpu::kernels().rms_norm, p, p.rows); }
  void run(const SiluMulParams& p) override { split(cpu::kernels().silu_mul, p, p.rows); }
  void run(const CopyPagesParams& p) override { split(cpu::copy_pages, p, p.pairs * p.outer); }

  int64_t scratch(const PagedAttentionParams&) override { return 0; }
  int64_t scratch(const UnmaskParams&) override { return 0; }
};

} // namespace

std::unique_ptr<Backend> make_cpu() { return std::make_unique<Cpu>(); }

} // namespace fastdllm::bench
