// Python bindings of what is not a tensor operation: the page pool, the loop of a block as a CUDA graph, and
// facts about the build.
// Importing this module also registers the operations (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "core/huge_pages.h"
#include "core/page_pool.h"
#include "core/params.h"
#include "cpu/kernels.h"
#include "cuda/block_loop.h"
#include "cuda/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using fastdllm::PagePool;
  using fastdllm::cuda::BlockLoop;

  py::register_exception<fastdllm::OutOfPages>(m, "OutOfPages", PyExc_ValueError);

  py::class_<PagePool>(m, "PagePool", "Reference-counted pages of a fixed pool.")
      .def(py::init<int64_t>(), py::arg("num_pages"))
      .def("allocate", &PagePool::allocate, py::arg("count"),
           "Pages with one owner each. OutOfPages (a ValueError), and no change, where fewer are free.")
      .def("fork", &PagePool::fork, py::arg("pages"), "One more owner for each page.")
      .def("free", &PagePool::free, py::arg("pages"),
           "One owner less for each page. ValueError, and no change, where one has none left.")
      .def("make_private", &PagePool::make_private, py::arg("page"),
           "A page that only the caller owns: the page itself, or a fresh one to copy it into.")
      .def("refcount", &PagePool::refcount, py::arg("page"))
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("num_used", &PagePool::num_used)
      .def_property_readonly("num_shared", &PagePool::num_shared)
      .def_property_readonly("peak_used", &PagePool::peak_used);

  py::class_<BlockLoop>(
      m, "BlockLoop",
      "A captured step, again and again in one launch: until a row's block is filled, an EOS "
      "finishes it or its logits are bad, or `cap` steps are taken.")
      .def(
          py::init([](uintptr_t step_graph, uintptr_t rows_ptr, int64_t count, uintptr_t iterations_ptr,
                      int64_t cap) {
            return std::make_unique<BlockLoop>(reinterpret_cast<void*>(step_graph),
                                               reinterpret_cast<const fastdllm::RowState*>(rows_ptr), count,
                                               reinterpret_cast<int64_t*>(iterations_ptr), cap);
          }),
          py::arg("step_graph"), py::arg("rows_ptr"), py::arg("count"), py::arg("iterations_ptr"),
          py::arg("cap"),
          "Takes addresses: the cudaGraph_t of a step, and on the current device the `rows` of unmask and an "
          "int64 that gets the number of steps. RuntimeError where the loop cannot be made: the text says "
          "why.")
      .def(
          "launch", [](BlockLoop& loop, uintptr_t stream) { loop.launch(reinterpret_cast<void*>(stream)); },
          py::arg("stream"), "On a cudaStream_t of the same device, given by its address; returns at once.");

  // Column of each RowState field in the `rows` tensor of unmask.
#define FASTDLLM_COLUMN(field)                                                                               \
  {                                                                                                          \
    #field, offsetof(fastdllm::RowState, field) / sizeof(int64_t)                                            \
  }
  const std::map<std::string, size_t> columns{
      FASTDLLM_COLUMN(rule),   FASTDLLM_COLUMN(score),      FASTDLLM_COLUMN(seed),
      FASTDLLM_COLUMN(stream), FASTDLLM_COLUMN(first),      FASTDLLM_COLUMN(end),
      FASTDLLM_COLUMN(step),   FASTDLLM_COLUMN(block_step), FASTDLLM_COLUMN(masks_left),
      FASTDLLM_COLUMN(eos_at), FASTDLLM_COLUMN(bad_logits), FASTDLLM_COLUMN(arrivals)};
  m.attr("ROW_COLUMNS") = columns;
  // And of each RowKnobs field in the `knobs` tensor.
#define FASTDLLM_KNOB(field)                                                                                 \
  {                                                                                                          \
    #field, offsetof(fastdllm::RowKnobs, field) / sizeof(float)                                              \
  }
  const std::map<std::string, size_t> knobs{
      FASTDLLM_KNOB(value), FASTDLLM_KNOB(temperature), FASTDLLM_KNOB(softmax_temperature),
      FASTDLLM_KNOB(top_p), FASTDLLM_KNOB(top_k),       FASTDLLM_KNOB(rank_temperature)};
  m.attr("KNOB_COLUMNS") = knobs;

  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < fastdllm::cpu::isa_count(); ++i)
          names.emplace_back(fastdllm::cpu::isa_name(i));
        return names;
      },
      "Instruction sets that were compiled in and that this CPU has, the best one last.");
  m.def("cpu_isa", [] { return fastdllm::cpu::kernels().isa; }, "The instruction set in use.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (!fastdllm::cpu::set_isa(name.c_str()))
          throw py::value_error("set_cpu_isa: '" + name + "' is not available on this CPU");
      },
      py::arg("name"), "Use another instruction set from cpu_isas().");

  m.def(
      "advise_huge_pages",
      [](uintptr_t address, int64_t bytes) {
        fastdllm::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "Asks for large pages of memory that nothing has touched yet.");

  // Rows of x up to which ops.linear is a kernel of ours.
  const std::map<std::string, int64_t> few_rows{
      {"float32", fastdllm::cpu::linear_rows(fastdllm::Dtype::kFloat32)},
      {"bfloat16", fastdllm::cpu::linear_rows(fastdllm::Dtype::kBFloat16)}};
  m.attr("FEW_ROWS") = few_rows;

  m.attr("built_for_torch") = FASTDLLM_TORCH_VERSION;
  m.attr("build_type") = FASTDLLM_BUILD_TYPE;
  m.attr("cuda_built") = fastdllm::cuda::built();
  m.attr("cuda_architectures") = fastdllm::cuda::architectures();
  m.attr("cuda_runtime_version") = fastdllm::cuda::runtime_version();
}
