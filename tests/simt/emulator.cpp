// The scheduler of the emulator: runs the blocks of a launch one after another, and the threads of a block as
// fibers that take turns at barriers and warp collectives.
//
// Schedules (simt_set_schedule): the order of blocks and threads and the moment at which asynchronous copies
// arrive follow from one number, so a failure repeats. 0: in order, copies as late as they may be. 1: the
// thread that was released last goes first, so warps run far ahead of each other; copies at once. Others:
// random in all of it, with that seed.
//
// Checked: shared memory starts as NaN; a launch within the device's limits; lanes of a warp at the same
// collective; no barrier that some threads never reach; copies on 16 bytes and inside shared memory, none
// under way at the end; bytes behind the shared memory asked for stay untouched.
#include "cuda_runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) (void)(p), (void)(n)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) (void)(p), (void)(n)
#endif

namespace fastdllm::cuda {
inline constexpr size_t kMostShared = 227 << 10;
alignas(1024) unsigned char dynamic_shared[kMostShared + 1024];
} // namespace fastdllm::cuda

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

using fastdllm::cuda::dynamic_shared;
using fastdllm::cuda::kMostShared;

const Thread* current = nullptr;

namespace {

// ---------------------------------------------------------------------------------------------------------
// Switching stacks
// ---------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 256 << 10; // mapped, touched only as far as it is used

#ifdef __x86_64__
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void fastdllm_simt_switch(void** save, void* load);
asm(R"(.text
.type fastdllm_simt_switch, @function
fastdllm_simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
void switch_to(Context& from, Context& to) { fastdllm_simt_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr; // where entry would return to, and what aligns its stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i)
    *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t machine;
};
void switch_to(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStack;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// The state of a launch
// ---------------------------------------------------------------------------------------------------------

struct Copy {
  void* target;
  const void* source;
  unsigned bytes;
  void (*done)(void*, unsigned);
  void* argument;
};

struct Fiber : Thread {
  Context context;
  unsigned warp = 0;
  bool done = false;
  const LaneData* seen = nullptr;        // the last collective's data
  std::vector<Copy> open;                // copies of no group yet
  std::vector<std::vector<Copy>> groups; // closed and not waited for
};

struct Warp {
  LaneData data[2][32];
  unsigned parity = 0, live = 0, lanes = 0; // a bit for each live lane
  Together what = Together::kSync;
  std::vector<Fiber*> arrived;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<Fiber*> ready, waiting, at_barrier;
std::vector<Copy> bulk;
unsigned live = 0;
unsigned long events = 0, events_at_poll = 0; // anything that can end a wait
Context host;
const std::function<void()>* body = nullptr;
const char* kernel_name = "";
std::string error;
size_t shared_size = 0;

// ---------------------------------------------------------------------------------------------------------
// The schedule
// ---------------------------------------------------------------------------------------------------------

uint64_t schedule = 0, random_state = 0;

uint64_t random_below(uint64_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}
bool is_random() { return schedule > 1; }
bool copies_at_once() { return schedule == 1 || (is_random() && random_below(2) == 0); }

void perform(const Copy& copy) {
  if (copy.source)
    std::memcpy(copy.target, copy.source, copy.bytes);
  else
    std::memset(copy.target, 0, copy.bytes);
  if (copy.done)
    copy.done(copy.argument, copy.bytes);
  ++events;
}

void perform_one(std::vector<Copy>& copies) {
  const size_t i = is_random() ? random_below(copies.size()) : 0;
  const Copy copy = copies[i];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
  perform(copy);
}

Fiber* pick() {
  if (is_random()) {
    if (!bulk.empty() && random_below(8) == 0)
      perform_one(bulk);
    std::swap(ready[random_below(ready.size())], ready.back());
  }
  Fiber* next = ready.back();
  ready.pop_back();
  return next;
}

void run(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
}

// To the next thread that can run, or home where there is none.
void leave(Fiber& me) {
  if (ready.empty() && !waiting.empty()) {
    if (events == events_at_poll && !bulk.empty())
      perform_one(bulk);
    if (events != events_at_poll)
      ready.swap(waiting);
    events_at_poll = events;
  }
  if (ready.empty()) {
    if (live > 0 && error.empty())
      fail("deadlock: %u threads wait for something that never comes", live);
    switch_to(me.context, host);
    return;
  }
  Fiber* next = pick();
  run(*next);
  if (next != &me)
    switch_to(me.context, next->context);
}

Fiber& self() { return *static_cast<Fiber*>(const_cast<Thread*>(current)); }

// `fibers` may run again. In order of the schedule: what is pushed last goes first.
void release(std::vector<Fiber*>& group) {
  ++events;
  if (schedule == 0) // first arrived, first to go, behind all who are ready
    ready.insert(ready.begin(), group.rbegin(), group.rend());
  else
    ready.insert(ready.end(), group.begin(), group.end());
  group.clear();
}

void release_warp(Warp& warp, WarpWork work) {
  for (unsigned i = 0; i < 32; ++i)
    if (!(warp.lanes >> i & 1u))
      warp.data[warp.parity][i] = {};
  if (work)
    work(warp.data[warp.parity]);
  warp.parity ^= 1;
  release(warp.arrived);
}

void thread_main() {
  (*body)();
  Fiber& me = self();
  for (const auto& group : me.groups)
    if (!group.empty())
      fail("a thread ends before its asynchronous copies have come");
  if (!me.open.empty())
    fail("a thread ends with asynchronous copies of no group");
  me.done = true;
  --live;
  Warp& warp = warps[me.warp];
  --warp.live;
  warp.lanes &= ~(1u << me.lane);
  if (!warp.arrived.empty() && warp.arrived.size() == warp.live)
    fail("some lanes of a warp end while others wait for them");
  if (!at_barrier.empty() && at_barrier.size() == live)
    release(at_barrier);
  leave(me);
  __builtin_unreachable();
}

} // namespace

// ---------------------------------------------------------------------------------------------------------
// What kernels call
// ---------------------------------------------------------------------------------------------------------

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[128];
  std::snprintf(where, sizeof where, " (block %u, %u, %u, thread %u, schedule %llu) in ", blockIdx.x,
                blockIdx.y, blockIdx.z, current->index.x, static_cast<unsigned long long>(schedule));
  error = std::string("emulated CUDA: ") + text + where + kernel_name;
  switch_to(self().context, host); // never to come back: kernels own nothing
  __builtin_unreachable();
}

void warp_together(Together what, LaneData& mine, WarpWork all) {
  Fiber& me = self();
  Warp& warp = warps[me.warp];
  if (!warp.arrived.empty() && warp.what != what)
    fail("the lanes of a warp are at different collectives");
  warp.what = what;
  LaneData* data = warp.data[warp.parity];
  data[me.lane] = mine;
  warp.arrived.push_back(&me);
  if (warp.arrived.size() == warp.live)
    release_warp(warp, all);
  leave(me);
  mine = data[me.lane];
  me.seen = data;
}

const LaneData* warp_data() { return self().seen; }

void sync_threads() {
  Fiber& me = self();
  at_barrier.push_back(&me);
  if (at_barrier.size() == live)
    release(at_barrier);
  leave(me);
}

void wait_turn() {
  Fiber& me = self();
  waiting.push_back(&me);
  leave(me);
}

void copy_later(void* target, const void* source, unsigned bytes) {
  Copy copy{target, source, bytes, nullptr, nullptr};
  if (copies_at_once()) {
    perform(copy);
    copy.bytes = 0; // nothing is left of it but that it must be waited for
  }
  self().open.push_back(copy);
}

void close_group() {
  Fiber& me = self();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void wait_groups(int64_t still_open) {
  auto& groups = self().groups;
  while (static_cast<int64_t>(groups.size()) > still_open) {
    while (!groups.front().empty())
      perform_one(groups.front());
    groups.erase(groups.begin());
  }
}

void bulk_copy_later(void* target, const void* source, unsigned bytes, void (*done)(void*, unsigned),
                     void* argument) {
  const Copy copy{target, source, bytes, done, argument};
  if (copies_at_once())
    perform(copy);
  else
    bulk.push_back(copy);
}

bool in_shared(const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  return at >= dynamic_shared && at + bytes <= dynamic_shared + shared_size;
}

// ---------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------

namespace {

constexpr unsigned char kUntouched = 0x5a;

struct Device {
  int multiprocessors = 4, most_shared = kMostShared, shared_of_all = 228 << 10, major = 9;
};
Device device;
std::map<const void*, int> shared_limit;
bool refuse_next = false;
std::mutex one_at_a_time;

void run_block(unsigned threads) {
  std::memset(dynamic_shared, 0xff, shared_size);
  std::memset(dynamic_shared + shared_size, kUntouched, 1024);
  ASAN_POISON_MEMORY_REGION(dynamic_shared + shared_size, kMostShared + 1024 - shared_size);
  warps.assign((threads + 31) / 32, Warp{});
  ready.clear(), waiting.clear(), at_barrier.clear(), bulk.clear();
  live = threads;
  events = events_at_poll = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.done = false;
    fiber.open.clear(), fiber.groups.clear();
    ++warps[fiber.warp].live;
    warps[fiber.warp].lanes |= 1u << fiber.lane;
    static unsigned char* stacks = static_cast<unsigned char*>(mmap(
        nullptr, 1024 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    prepare(fiber.context, stacks + i * kStack, thread_main);
    ready.push_back(&fiber);
  }
  if (schedule == 0)
    std::reverse(ready.begin(), ready.end()); // thread 0 first
  Fiber* first = pick();
  run(*first);
  switch_to(host, first->context);
  ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, kMostShared + 1024);
  if (error.empty() && !bulk.empty())
    error = std::string("emulated CUDA: a block ends before its bulk copies have come in ") + kernel_name;
  for (int i = 0; i < 1024 && error.empty(); ++i)
    if (dynamic_shared[shared_size + i] != kUntouched)
      error = std::string("emulated CUDA: a write behind the shared memory asked for in ") + kernel_name;
}

} // namespace

int launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
           const std::function<void()>& thread_body) {
  const std::lock_guard lock(one_at_a_time);
  if (std::exchange(refuse_next, false))
    return cudaErrorInvalidConfiguration;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto limit = shared_limit.find(function);
  if (shared_bytes > static_cast<size_t>(limit == shared_limit.end() ? 48 << 10 : limit->second))
    return cudaErrorInvalidValue;
  while (fibers.size() < threads)
    fibers.push_back(std::make_unique<Fiber>());
  kernel_name = kernel;
  error.clear();
  shared_size = shared_bytes;
  blockDim = block;
  gridDim = grid;
  body = &thread_body;
  random_state = schedule * 0x9E3779B97F4A7C15ull + 1;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i)
    order[i] = schedule == 1 ? blocks - 1 - i : i;
  if (is_random())
    for (uint64_t i = blocks; i > 1; --i)
      std::swap(order[i - 1], order[random_below(i)]);
  for (uint64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    run_block(threads);
    if (!error.empty())
      break;
  }
  current = nullptr;
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

} // namespace simt

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
  case cudaSuccess:
    return "no error";
  case cudaErrorInvalidValue:
    return "invalid argument";
  case cudaErrorInvalidConfiguration:
    return "invalid configuration argument";
  case cudaErrorLaunchFailure:
    return simt::error.c_str();
  }
  return "unknown error";
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  if (value > simt::device.most_shared)
    return cudaErrorInvalidValue;
  simt::shared_limit[function] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
  case cudaDevAttrMultiProcessorCount:
    *value = simt::device.multiprocessors;
    return cudaSuccess;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    *value = simt::device.most_shared;
    return cudaSuccess;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    *value = simt::device.shared_of_all;
    return cudaSuccess;
  case cudaDevAttrComputeCapabilityMajor:
    *value = simt::device.major;
    return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// ---------------------------------------------------------------------------------------------------------
// For tests
// ---------------------------------------------------------------------------------------------------------

#define FASTDLLM_EXPORT extern "C" __attribute__((visibility("default")))

FASTDLLM_EXPORT void simt_set_schedule(uint64_t number) { simt::schedule = number; }

// The next launch fails, as one does that asks for more than the device has.
FASTDLLM_EXPORT void simt_refuse_next_launch() { simt::refuse_next = true; }

// A device with so many multiprocessors, and so many KiB of shared memory for a block and in all.
FASTDLLM_EXPORT void simt_set_device(int multiprocessors, int block_kib, int all_kib, int major) {
  simt::device = {multiprocessors, block_kib << 10, all_kib << 10, major};
}
