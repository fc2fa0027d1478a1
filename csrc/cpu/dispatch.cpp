// Which instruction set's kernels run. Compiled with the baseline flags: nothing here may need more.
#include "cpu/kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifdef FASTDLLM_X86_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastdllm::cpu {

#define FASTDLLM_DECLARE(isa)                                                                                \
  namespace isa {                                                                                            \
  void rope_write_kv(const RopeWriteKvParams&, int64_t, int64_t);                                            \
  void paged_attention(const PagedAttentionParams&, int64_t, int64_t);                                       \
  void score_logits(const UnmaskParams&, int64_t, int64_t);                                                  \
  void rms_norm(const RmsNormParams&, int64_t, int64_t);                                                     \
  void silu_mul(const SiluMulParams&, int64_t, int64_t);                                                     \
  void quantize_fp8(const QuantizeFp8Params&, int64_t, int64_t);                                             \
  void linear(const LinearParams&, int64_t, int64_t);                                                        \
  }
#define FASTDLLM_ENTRY(isa)                                                                                  \
  Kernels {                                                                                                  \
    #isa, isa::rope_write_kv, isa::paged_attention, isa::score_logits, isa::rms_norm, isa::silu_mul,         \
        isa::quantize_fp8, isa::linear                                                                       \
  }

FASTDLLM_DECLARE(portable)
#ifdef FASTDLLM_X86
FASTDLLM_DECLARE(avx2)
FASTDLLM_DECLARE(avx512)
FASTDLLM_DECLARE(avx512_bf16)
#endif
#ifdef FASTDLLM_X86_AMX
FASTDLLM_DECLARE(amx)
#endif

namespace {

#ifdef FASTDLLM_X86_AMX
// Linux hands out the tile registers, which are large, only to processes that ask for them.
bool amx_permitted() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25; // bf16, tile, int8
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kNeeded) != kNeeded)
    return false;
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Kernels> available() {
  std::vector<Kernels> sets{FASTDLLM_ENTRY(portable)};
#ifdef FASTDLLM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2)
    sets.push_back(FASTDLLM_ENTRY(avx2));
  if (avx512)
    sets.push_back(FASTDLLM_ENTRY(avx512));
  const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (avx512_bf16)
    sets.push_back(FASTDLLM_ENTRY(avx512_bf16));
#ifdef FASTDLLM_X86_AMX
  if (avx512_bf16 && amx_permitted())
    sets.push_back(FASTDLLM_ENTRY(amx));
#endif
#endif
  return sets;
}

const std::vector<Kernels>& sets() {
  static const std::vector<Kernels> all = available();
  return all;
}

int find(const char* name) {
  for (int i = 0; i < isa_count(); ++i)
    if (std::strcmp(sets()[i].isa, name) == 0)
      return i;
  return -1;
}

int fastest() {
  const int last = isa_count() - 1;
#ifdef FASTDLLM_X86
  // Multiply-adds a second by vdpbf16ps against float32 fma: twice as many on AMD, half as many on Intel.
  if (std::strcmp(sets()[last].isa, "avx512_bf16") == 0 && !__builtin_cpu_is("amd"))
    return last - 1;
#endif
  return last;
}

std::atomic<int>& chosen() {
  // FASTDLLM_CPU_ISA names a set; one that is not there is ignored.
  static std::atomic<int> index = [] {
    const char* name = std::getenv("FASTDLLM_CPU_ISA");
    const int asked = name ? find(name) : -1;
    return asked >= 0 ? asked : fastest();
  }();
  return index;
}

} // namespace

const Kernels& kernels() { return sets()[chosen().load(std::memory_order_relaxed)]; }
int isa_count() { return static_cast<int>(sets().size()); }
const char* isa_name(int index) { return sets()[index].isa; }

bool set_isa(const char* name) {
  const int index = find(name);
  if (index >= 0)
    chosen().store(index, std::memory_order_relaxed);
  return index >= 0;
}

int64_t paged_attention_items(const PagedAttentionParams& p) {
  const int64_t rows = p.max_seqlen_q * (p.q_heads / p.kv_heads);
  return p.sequences * p.kv_heads * ((rows + kAttentionTileRows - 1) / kAttentionTileRows);
}

int64_t linear_bands(const LinearParams& p) {
  const int64_t columns = (p.gated ? 1 : 2) * kLinearBandRows;
  return (p.n + columns - 1) / columns;
}
int64_t linear_items(const LinearParams& p) {
  const int64_t most = linear_rows(p.dtype);
  return (p.rows + most - 1) / most * linear_bands(p);
}

void* scratch(int64_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { ::operator delete(data, kAlignment); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    ::operator delete(buffer.data, kAlignment);
    buffer.data = nullptr;
    buffer.size = 0;
    buffer.data = ::operator new(bytes, kAlignment);
    buffer.size = bytes;
  }
  return buffer.data;
}

} // namespace fastdllm::cpu
