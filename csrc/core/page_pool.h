// Reference-counted pages of a fixed pool: who owns which page of the KV cache. Host only.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastdllm {

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class PagePool {
public:
  explicit PagePool(int64_t num_pages);

  // `count` pages with one owner each. OutOfPages, and no change, where fewer are free.
  std::vector<int64_t> allocate(int64_t count);
  // One more owner for each page: copy on write.
  void fork(const std::vector<int64_t>& pages);
  // One owner less for each page. invalid_argument, and no change, where one has none left.
  void free(const std::vector<int64_t>& pages);
  // A page that only the caller owns: `page` itself, or a fresh one in its place, into which the
  // caller must copy. The caller's share of `page` moves to it.
  int64_t make_private(int64_t page);

  int64_t refcount(int64_t page) const;
  int64_t num_pages() const { return static_cast<int64_t>(refcounts_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_used() const { return num_pages() - num_free(); }
  int64_t num_shared() const;
  int64_t peak_used() const { return peak_used_; }

private:
  void check_owned(const std::vector<int64_t>& pages, int64_t owners_given_up, const char* what) const;

  std::vector<int64_t> free_;
  std::vector<int32_t> refcounts_;
  int64_t peak_used_ = 0;
};

} // namespace fastdllm
