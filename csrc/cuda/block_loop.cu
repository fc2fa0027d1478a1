// BlockLoop (block_loop.h) as a graph with a conditional node:
//
//   memset iterations = 0  ->  WHILE { child graph: the step  ->  decide: goes_on(rows, iterations)? }
//
// The condition begins as true, so that the body runs once before `decide` is asked. The nodes of the step
// are looked at before: of one that a conditional body may not hold, the driver says only that it is invalid.
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/block_condition.h"
#include "cuda/block_loop.h"

namespace fastdllm::cuda {
namespace {

constexpr int kFirstVersion = 12040; // with conditional nodes whose bodies hold child graphs
static_assert(CUDART_VERSION >= kFirstVersion, "conditional nodes take CUDA 12.4");

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error("BlockLoop: " + text); }

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess)
    return;
  cudaGetLastError(); // clears it
  fail(std::string(what) + ": " + cudaGetErrorString(error));
}

void check_driver() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "the driver's version");
  if (version == 0)
    fail("no CUDA driver is installed");
  if (version < kFirstVersion)
    fail("the driver is of CUDA " + std::to_string(version / 1000) + "." +
         std::to_string(version % 1000 / 10) + "; a loop in a graph takes 12.4");
}

// ---------------------------------------------------------------------------------------------------------
// What a step may hold
// ---------------------------------------------------------------------------------------------------------

// Why a conditional body cannot hold the node; nullptr where it can.
const char* misfit(cudaGraphNode_t node, cudaGraphNodeType type) {
  switch (type) {
  case cudaGraphNodeTypeKernel: {
    cudaLaunchAttributeValue value{};
    check(cudaGraphKernelNodeGetAttribute(node, cudaLaunchAttributeCooperative, &value),
          "a kernel's attributes");
    return value.cooperative ? "cooperative kernel" : nullptr;
  }
  case cudaGraphNodeTypeMemcpy:
  case cudaGraphNodeTypeMemset:
  case cudaGraphNodeTypeEmpty:
  case cudaGraphNodeTypeGraph:
    return nullptr;
  case cudaGraphNodeTypeHost:
    return "host function";
  case cudaGraphNodeTypeWaitEvent:
    return "wait for an event";
  case cudaGraphNodeTypeEventRecord:
    return "record of an event";
  case cudaGraphNodeTypeExtSemaphoreSignal:
  case cudaGraphNodeTypeExtSemaphoreWait:
    return "external semaphore";
  case cudaGraphNodeTypeMemAlloc:
  case cudaGraphNodeTypeMemFree:
    return "allocation of memory";
  case cudaGraphNodeTypeConditional:
    return "conditional node";
  default:
    return "node of an unknown type";
  }
}

// Counts the nodes that do not fit, those of child graphs too.
void audit(cudaGraph_t graph, std::map<std::string, int>& found) {
  size_t count = 0;
  check(cudaGraphGetNodes(graph, nullptr, &count), "the step's nodes");
  std::vector<cudaGraphNode_t> nodes(count);
  if (count > 0)
    check(cudaGraphGetNodes(graph, nodes.data(), &count), "the step's nodes");
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    check(cudaGraphNodeGetType(node, &type), "a node's type");
    if (const char* what = misfit(node, type))
      ++found[what];
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      check(cudaGraphChildGraphNodeGetGraph(node, &child), "a child graph");
      audit(child, found);
    }
  }
}

void check_step(cudaGraph_t step) {
  std::map<std::string, int> found;
  audit(step, found);
  std::string text;
  for (const auto& [what, count] : found)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " x " + what;
  if (!text.empty())
    fail("the step holds nodes that a loop in a graph may not: " + text);
}

// ---------------------------------------------------------------------------------------------------------
// The loop
// ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kWarp) decide(cudaGraphConditionalHandle condition, const RowState* rows,
                                                int64_t count, int64_t* iterations, int64_t cap) {
  const bool again = goes_on(rows, count, iterations, cap);
  if (threadIdx.x == 0)
    cudaGraphSetConditional(condition, again);
}

// CUDA 13 has one form of cudaGraphAddNode, that with the edges' data; CUDA 12 the one without.
cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                     cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, after, nullptr, 1, params);
#else
  return cudaGraphAddNode(node, graph, after, 1, params);
#endif
}

// The body of a loop that comes after node `after`, to be filled.
cudaGraph_t add_loop(cudaGraph_t graph, cudaGraphNode_t after, cudaGraphConditionalHandle condition) {
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = condition;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
  check(add_node(&node, graph, &after, &params), "the conditional node");
  return params.conditional.phGraph_out[0];
}

} // namespace

struct BlockLoop::Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ~Graph() {
    if (exec != nullptr)
      cudaGraphExecDestroy(exec);
    if (graph != nullptr)
      cudaGraphDestroy(graph);
  }
};

BlockLoop::BlockLoop(void* step, const RowState* rows, int64_t count, int64_t* iterations, int64_t cap)
    : graph_(std::make_unique<Graph>()) {
  if (count < 1 || cap < 1)
    fail(std::to_string(count) + " rows and a cap of " + std::to_string(cap) +
         " steps; takes 1 or more of each");
  check_driver();
  check_step(static_cast<cudaGraph_t>(step));

  cudaGraph_t& graph = graph_->graph;
  check(cudaGraphCreate(&graph, 0), "a graph");
  cudaMemsetParams zero{};
  zero.dst = iterations;
  zero.elementSize = sizeof(int32_t);
  zero.width = sizeof(int64_t) / sizeof(int32_t);
  zero.height = 1;
  cudaGraphNode_t reset = nullptr, child = nullptr, last = nullptr;
  check(cudaGraphAddMemsetNode(&reset, graph, nullptr, 0, &zero), "the memset node");

  cudaGraphConditionalHandle condition{};
  check(cudaGraphConditionalHandleCreate(&condition, graph, 1, cudaGraphCondAssignDefault), "the condition");
  cudaGraph_t body = add_loop(graph, reset, condition);
  check(cudaGraphAddChildGraphNode(&child, body, nullptr, 0, static_cast<cudaGraph_t>(step)),
        "the step as a child graph");
  void* args[] = {&condition, &rows, &count, &iterations, &cap};
  cudaKernelNodeParams kernel{};
  kernel.func = reinterpret_cast<void*>(decide);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(kWarp);
  kernel.kernelParams = args;
  check(cudaGraphAddKernelNode(&last, body, &child, 1, &kernel), "the kernel that decides");

  cudaGraphInstantiateParams params{};
  const cudaError_t error = cudaGraphInstantiateWithParams(&graph_->exec, graph, &params);
  if (error != cudaSuccess)
    graph_->exec = nullptr;
  check(error, ("instantiation, result " + std::to_string(params.result_out)).c_str());
}

BlockLoop::~BlockLoop() = default;

void BlockLoop::launch(void* stream) {
  check(cudaGraphLaunch(graph_->exec, static_cast<cudaStream_t>(stream)), "launch");
}

} // namespace fastdllm::cuda
