// Every operation over realistic shapes: one block step of LLaDA-8B and of Dream-7B.
#pragma once

#include <string>
#include <vector>

#include "backend.h"

namespace fastdllm::bench {

// A call on any of `sets` sets of data, which together are several times the last cache.
struct Case {
  Call call;
  int sets = 0;
  std::vector<std::shared_ptr<void>> memory; // what the call works on
};

struct Operation {
  std::string name;  // operation/model/dtype/...
  int64_t bytes;     // that a call must move: the floor
  int64_t set_bytes; // of one set of data
  std::function<Case(Backend&)> make;
};

std::vector<Operation> operations();

} // namespace fastdllm::bench
