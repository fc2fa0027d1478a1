#include "core/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastdllm {

void advise_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21; // where they are larger, the kernel looks for itself
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const uintptr_t begin = (at + kHuge - 1) / kHuge * kHuge, end = (at + bytes) / kHuge * kHuge;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

} // namespace fastdllm
