// Large pages of virtual memory for what is read from end to end.
#pragma once

#include <cstdint>

namespace fastdllm {

// Asks for large pages where [address, address + bytes) has room for whole ones that nothing has touched yet.
// A wish: on systems without them, nothing happens.
void advise_huge_pages(void* address, int64_t bytes);

} // namespace fastdllm
