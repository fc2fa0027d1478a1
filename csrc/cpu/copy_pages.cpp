// pages[o, dst[i]] = pages[o, src[i]] for every pair i and every pool o.
//
// Pool o starts outer_stride_bytes * o after `pages`; a page is page_bytes of it.
// Bytes: every copied page read once and written once.
// Work: an item is (pool, pair). No page is both a source and a destination, so that items are independent.
#include "cpu/kernels.h"

#include <cstring>

namespace fastdllm::cpu {

void copy_pages(const CopyPagesParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    char* pool = static_cast<char*>(p.pages) + item / p.pairs * p.outer_stride_bytes;
    const int64_t pair = item % p.pairs;
    std::memcpy(pool + p.dst[pair] * p.page_bytes, pool + p.src[pair] * p.page_bytes, p.page_bytes);
  }
}

} // namespace fastdllm::cpu
