#include "core/page_pool.h"

#include <algorithm>
#include <map>
#include <string>

namespace fastdllm {

PagePool::PagePool(int64_t num_pages) {
  if (num_pages < 1)
    throw std::invalid_argument("PagePool: num_pages=" + std::to_string(num_pages) + "; takes 1 or more");
  refcounts_.assign(num_pages, 0);
  free_.reserve(num_pages);
  for (int64_t page = num_pages - 1; page >= 0; --page)
    free_.push_back(page); // handed out from the back: lowest numbers first
}

std::vector<int64_t> PagePool::allocate(int64_t count) {
  if (count < 0)
    throw std::invalid_argument("PagePool: count=" + std::to_string(count) + "; takes 0 or more");
  if (count > num_free())
    throw OutOfPages("PagePool: needed " + std::to_string(count) + " pages, " + std::to_string(num_free()) +
                     " of " + std::to_string(num_pages()) + " are free");
  std::vector<int64_t> pages(free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - count);
  for (int64_t page : pages)
    refcounts_[page] = 1;
  peak_used_ = std::max(peak_used_, num_used());
  return pages;
}

void PagePool::check_owned(const std::vector<int64_t>& pages, int64_t owners_given_up,
                           const char* what) const {
  std::map<int64_t, int64_t> times;
  for (int64_t page : pages) {
    if (page < 0 || page >= num_pages())
      throw std::invalid_argument(std::string("PagePool: ") + what + " of page " + std::to_string(page) +
                                  "; the pool has pages 0 to " + std::to_string(num_pages() - 1));
    const int64_t needed = std::max<int64_t>(1, owners_given_up * ++times[page]);
    if (refcounts_[page] < needed)
      throw std::invalid_argument(std::string("PagePool: ") + what + " of page " + std::to_string(page) +
                                  ", which has " + std::to_string(refcounts_[page]) +
                                  " owners (double free?)");
  }
}

void PagePool::fork(const std::vector<int64_t>& pages) {
  check_owned(pages, 0, "fork");
  for (int64_t page : pages)
    ++refcounts_[page];
}

void PagePool::free(const std::vector<int64_t>& pages) {
  check_owned(pages, 1, "free");
  for (int64_t page : pages)
    if (--refcounts_[page] == 0)
      free_.push_back(page);
}

int64_t PagePool::make_private(int64_t page) {
  check_owned({page}, 1, "make_private");
  if (refcounts_[page] == 1)
    return page;
  const int64_t fresh = allocate(1).front();
  --refcounts_[page];
  return fresh;
}

int64_t PagePool::refcount(int64_t page) const {
  if (page < 0 || page >= num_pages())
    throw std::invalid_argument("PagePool: page=" + std::to_string(page) + "; the pool has pages 0 to " +
                                std::to_string(num_pages() - 1));
  return refcounts_[page];
}

int64_t PagePool::num_shared() const {
  return std::count_if(refcounts_.begin(), refcounts_.end(), [](int32_t count) { return count > 1; });
}

} // namespace fastdllm
