// The torch operations: schemas, argument checks, dispatch. What each computes stands in core/params.h.
// Only the LibTorch stable ABI is used, so that one build serves many torch versions.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "core/params.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace {

// The library of operations. Compiled with FASTDLLM_SIMT this file makes one for the tests, whose operations
// take CPU tensors and run the CUDA kernels in the emulator of tests/simt.
#ifdef FASTDLLM_SIMT
#define FASTDLLM_LIBRARY fastdllm_simt
constexpr bool kEmulated = true;
#else
#define FASTDLLM_LIBRARY fastdllm_ext
constexpr bool kEmulated = false;
#endif

using fastdllm::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------
// Argument checks
// ---------------------------------------------------------------------------------------------------------

template <class... Parts> void check(bool condition, const Parts&... parts) {
  if (condition)
    return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i)
    text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

bool is_same_shape(const Tensor& a, const Tensor& b) {
  return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
}

constexpr int64_t kAny = -1;

// Whether the CUDA kernels work on it.
bool for_cuda(const Tensor& t) { return kEmulated || t.is_cuda(); }

// One operation's view of its arguments: every check names the operation and the argument.
struct Checker {
  const char* op;
  const Tensor& on; // the tensor whose device all others must share

  void shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    int64_t i = 0;
    for (int64_t size : expected) {
      same = same && (size == kAny || t.size(i) == size);
      ++i;
    }
    if (same)
      return;
    std::ostringstream text;
    for (int64_t size : expected)
      text << (text.tellp() ? ", " : "") << (size == kAny ? "*" : std::to_string(size));
    check(false, op, ": ", name, " has shape ", shape_text(t), "; takes [", text.str(), "]");
  }
  void tensor(const Tensor& t, const char* name, ScalarType dtype, const char* dtype_name,
              std::initializer_list<int64_t> expected) const {
    shape(t, name, expected);
    check(t.scalar_type() == dtype, op, ": ", name, " has another dtype; takes ", dtype_name);
    check(t.is_contiguous(), op, ": ", name, " is not contiguous");
    device(t, name);
  }
  void int64(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const {
    tensor(t, name, ScalarType::Long, "int64", expected);
  }
  void int32(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const {
    tensor(t, name, ScalarType::Int, "int32", expected);
  }
  void float32(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const {
    tensor(t, name, ScalarType::Float, "float32", expected);
  }
  void device(const Tensor& t, const char* name) const {
    check(t.is_cuda() == on.is_cuda() && t.get_device_index() == on.get_device_index(), op, ": ", name,
          " is on another device than the first argument");
  }
  void same_dtype(const Tensor& t, const char* name) const {
    check(t.scalar_type() == on.scalar_type(), op, ": ", name, " has another dtype than the first argument");
  }
  // [tokens, heads, head_dim] whose heads lie side by side; returns the stride between tokens.
  int64_t token_stride(const Tensor& t, const char* name) const {
    check(t.size(2) <= 1 || t.stride(2) == 1, op, ": ", name, " has strided elements");
    check(t.size(1) <= 1 || t.stride(1) == t.size(2), op, ": ", name, " has strided heads");
    device(t, name);
    same_dtype(t, name);
    return t.stride(0);
  }
  // [..., columns] whose rows are evenly spaced; returns the stride between them.
  int64_t row_stride(const Tensor& t, const char* name) const {
    const int64_t last = t.dim() - 1;
    check(t.size(last) <= 1 || t.stride(last) == 1, op, ": ", name, " has strided columns");
    device(t, name);
    same_dtype(t, name);
    int64_t stride = t.size(last), rows = 1;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (t.size(i) == 1)
        continue;
      if (rows == 1)
        stride = t.stride(i);
      check(t.stride(i) == stride * rows, op, ": ", name, " has unevenly spaced rows");
      rows *= t.size(i);
    }
    return stride;
  }
  // [pages, kv_heads, page_size, head_dim] in the dtype of the first argument, or in float8_e4m3fn, and then
  // the scale of each vector.
  void pages(const Tensor& t, const char* name, const std::optional<Tensor>& scales, const char* scales_name,
             int64_t kv_heads, int64_t head_dim) const {
    shape(t, name, {kAny, kv_heads, kAny, head_dim});
    check(t.is_contiguous(), op, ": ", name, " is not contiguous");
    device(t, name);
    const int64_t size = t.size(2);
    check(size == 16 || size == 32 || size == 64, op, ": page_size ", size, "; takes 16, 32 or 64");
    if (t.scalar_type() == ScalarType::Float8_e4m3fn) {
      check(scales.has_value(), op, ": ", name, " is float8_e4m3fn and ", scales_name, " is None; takes [",
            t.size(0), ", ", t.size(1), ", ", size, "] float32");
      return float32(*scales, scales_name, {t.size(0), t.size(1), size});
    }
    check(t.scalar_type() == on.scalar_type(), op, ": ", name,
          " has another dtype than the first argument; takes that, or float8_e4m3fn with ", scales_name);
    check(!scales.has_value(), op, ": ", scales_name, " is given and ", name,
          " is not float8_e4m3fn; takes None");
  }
  // Keys and values alike.
  void pages(const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
             const std::optional<Tensor>& v_scales, int64_t kv_heads, int64_t head_dim) const {
    pages(k, "k_pages", k_scales, "k_scales", kv_heads, head_dim);
    pages(v, "v_pages", v_scales, "v_scales", k.size(1), head_dim);
    shape(v, "v_pages", {k.size(0), k.size(1), k.size(2), head_dim});
    check(v.scalar_type() == k.scalar_type(), op, ": v_pages has another dtype than k_pages; takes that");
  }
  void head_dim(int64_t head_dim) const {
    check(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0, op, ": head_dim ", head_dim,
          "; takes a multiple of 8 from 8 to 256");
  }
  Dtype dtype(const Tensor& t, const char* name) const {
    switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      check(for_cuda(t), op, ": ", name,
            " is float16, which the CPU kernels do not take; use float32 or bfloat16");
      return Dtype::kFloat16;
    default:
      break;
    }
    check(false, op, ": ", name, " has an unsupported dtype; takes float32, bfloat16 (and float16 on CUDA)");
    return Dtype::kFloat32;
  }
};

// On the CPU an index can be checked before it is used. On CUDA that would synchronise; there the
// caller's own bookkeeping must hold.
void check_range(const char* op, const char* name, const int64_t* values, int64_t count, int64_t low,
                 int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    check(values[i] >= low && values[i] < high, op, ": ", name, "[", i, "] is ", values[i], "; takes ",
          low == INT64_MIN ? "anything up" : std::to_string(low), " to ", high - 1);
}

void check_offsets(const char* op, const char* name, const int32_t* offsets, int64_t count, int64_t total) {
  check(offsets[0] == 0 && offsets[count] == total, op, ": ", name, " runs from ", offsets[0], " to ",
        offsets[count], "; takes 0 to ", total);
  for (int64_t i = 0; i < count; ++i)
    check(offsets[i] <= offsets[i + 1], op, ": ", name, " falls at ", i);
}

// ---------------------------------------------------------------------------------------------------------
// Dispatch
// ---------------------------------------------------------------------------------------------------------

// The stable Stream::nativeHandle() exists from torch 2.13 only. The older C function lives in libtorch_cuda,
// which a CPU-only torch has not: take it from the copy that a CUDA torch has already loaded.
void* current_cuda_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  check(function != nullptr, "fastdllm_ext: the loaded torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

// f() with the device of `t` current.
template <class F> auto on_device(const Tensor& t, const F& f) {
  if constexpr (kEmulated) {
    return f();
  } else {
    const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
    return f();
  }
}

// On the first tensor's device and its current stream. An error names the operation and all shapes.
template <class Params>
void launch_cuda(const char* op, const char* (*launcher)(const Params&, void*), const Params& params,
                 std::initializer_list<Named> tensors) {
  const Tensor& first = tensors.begin()->tensor;
  const char* error = on_device(first, [&] {
    return launcher(params, kEmulated ? nullptr : current_cuda_stream(first.get_device_index()));
  });
  if (error == nullptr)
    return;
  std::ostringstream shapes;
  for (const Named& t : tensors)
    shapes << (shapes.tellp() ? ", " : "") << t.name << ' ' << shape_text(t.tensor);
  check(false, op, ": ", error, " (", shapes.str(), ")");
}

// Splits the work list over torch's threads. `nanoseconds` is a rough estimate for one item on one core: a
// thread is woken only for work that takes longer than waking it.
template <class Params>
void run_cpu(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t items,
             double nanoseconds) {
  constexpr double kWorthAThread = 10e3;
  const auto grain = static_cast<int64_t>(kWorthAThread / std::max(nanoseconds, 1.0)) + 1;
  torch::stable::parallel_for(0, items, grain,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* mutable_data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// ---------------------------------------------------------------------------------------------------------
// Operations
// ---------------------------------------------------------------------------------------------------------

Tensor rope_write_kv(const Tensor q, const Tensor k, const Tensor v, const Tensor cos, const Tensor sin,
                     const Tensor positions, const Tensor slots, Tensor k_pages, Tensor v_pages,
                     std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  const char* op = "rope_write_kv";
  const Checker is{op, q};
  const Dtype dtype = is.dtype(q, "q");
  is.shape(q, "q", {kAny, kAny, kAny});
  const int64_t tokens = q.size(0), head_dim = q.size(2);
  is.head_dim(head_dim);
  is.shape(k, "k", {tokens, kAny, head_dim});
  is.shape(v, "v", {tokens, k.size(1), head_dim});
  is.float32(cos, "cos", {kAny, kAny});
  check(cos.size(1) >= 1 && 2 * cos.size(1) <= head_dim, op, ": cos has ", cos.size(1),
        " columns; takes at most head_dim / 2 = ", head_dim / 2);
  is.float32(sin, "sin", {cos.size(0), cos.size(1)});
  is.int64(positions, "positions", {tokens});
  is.int64(slots, "slots", {tokens});
  is.pages(k_pages, v_pages, k_scales, v_scales, k.size(1), head_dim);

  const int64_t q_stride = is.token_stride(q, "q"), k_stride = is.token_stride(k, "k"),
                v_stride = is.token_stride(v, "v");
  Tensor out = torch::stable::new_empty(q, {tokens, q.size(1), head_dim});
  const fastdllm::RopeWriteKvParams params{.q = q.const_data_ptr(),
                                           .k = k.const_data_ptr(),
                                           .v = v.const_data_ptr(),
                                           .cos = data<float>(cos),
                                           .sin = data<float>(sin),
                                           .positions = data<int64_t>(positions),
                                           .slots = data<int64_t>(slots),
                                           .q_out = out.mutable_data_ptr(),
                                           .k_pages = k_pages.mutable_data_ptr(),
                                           .v_pages = v_pages.mutable_data_ptr(),
                                           .k_scales = k_scales ? mutable_data<float>(*k_scales) : nullptr,
                                           .v_scales = v_scales ? mutable_data<float>(*v_scales) : nullptr,
                                           .tokens = tokens,
                                           .q_heads = q.size(1),
                                           .kv_heads = k.size(1),
                                           .head_dim = head_dim,
                                           .rotary_dim = 2 * cos.size(1),
                                           .page_size = k_pages.size(2),
                                           .q_stride = q_stride,
                                           .k_stride = k_stride,
                                           .v_stride = v_stride,
                                           .dtype = dtype};
  if (for_cuda(q)) {
    launch_cuda(op, fastdllm::cuda::rope_write_kv, params,
                {{"q", q},
                 {"k", k},
                 {"v", v},
                 {"cos", cos},
                 {"sin", sin},
                 {"positions", positions},
                 {"slots", slots},
                 {"k_pages", k_pages},
                 {"v_pages", v_pages}});
  } else {
    check_range(op, "positions", params.positions, tokens, 0, cos.size(0));
    check_range(op, "slots", params.slots, tokens, INT64_MIN, k_pages.size(0) * k_pages.size(2));
    run_cpu(fastdllm::cpu::kernels().rope_write_kv, params, fastdllm::cpu::rope_write_kv_items(params),
            0.3 * head_dim * (q.size(1) + 2 * k.size(1)));
  }
  return out;
}

Tensor paged_attention(const Tensor q, const Tensor k_pages, const Tensor v_pages, const Tensor block_table,
                       const Tensor kv_lens, const Tensor cu_seqlens_q, int64_t max_seqlen_q, double scale,
                       const std::optional<Tensor> k_scales, const std::optional<Tensor> v_scales) {
  const char* op = "paged_attention";
  const Checker is{op, q};
  const Dtype dtype = is.dtype(q, "q");
  is.shape(q, "q", {kAny, kAny, kAny});
  check(q.is_contiguous(), op, ": q is not contiguous");
  const int64_t q_heads = q.size(1), head_dim = q.size(2);
  is.head_dim(head_dim);
  is.pages(k_pages, v_pages, k_scales, v_scales, kAny, head_dim);
  const int64_t kv_heads = k_pages.size(1), page_size = k_pages.size(2);
  check(kv_heads > 0 && q_heads % kv_heads == 0, op, ": q has ", q_heads, " heads; takes a multiple of the ",
        kv_heads, " heads of k_pages");
  is.int32(block_table, "block_table", {kAny, kAny});
  const int64_t sequences = block_table.size(0);
  is.int32(kv_lens, "kv_lens", {sequences});
  is.int32(cu_seqlens_q, "cu_seqlens_q", {sequences + 1});

  Tensor out = torch::stable::new_empty(q, {q.size(0), q_heads, head_dim});
  fastdllm::PagedAttentionParams params{.q = q.const_data_ptr(),
                                        .k_pages = k_pages.const_data_ptr(),
                                        .v_pages = v_pages.const_data_ptr(),
                                        .k_scales = k_scales ? data<float>(*k_scales) : nullptr,
                                        .v_scales = v_scales ? data<float>(*v_scales) : nullptr,
                                        .block_table = data<int32_t>(block_table),
                                        .kv_lens = data<int32_t>(kv_lens),
                                        .cu_seqlens_q = data<int32_t>(cu_seqlens_q),
                                        .out = out.mutable_data_ptr(),
                                        .scratch = nullptr,
                                        .tokens = q.size(0),
                                        .sequences = sequences,
                                        .max_blocks = block_table.size(1),
                                        .max_seqlen_q = max_seqlen_q,
                                        .q_heads = q_heads,
                                        .kv_heads = kv_heads,
                                        .head_dim = head_dim,
                                        .page_size = page_size,
                                        .scale = static_cast<float>(scale),
                                        .dtype = dtype};
  if (for_cuda(q)) {
    check(max_seqlen_q >= 0, op, ": max_seqlen_q ", max_seqlen_q, "; takes 0 or more");
    const int64_t floats = on_device(q, [&] { return fastdllm::cuda::paged_attention_scratch(params); });
    Tensor scratch = torch::stable::new_empty(q, {floats}, ScalarType::Float);
    params.scratch = mutable_data<float>(scratch);
    launch_cuda(op, fastdllm::cuda::paged_attention, params,
                {{"q", q},
                 {"k_pages", k_pages},
                 {"v_pages", v_pages},
                 {"block_table", block_table},
                 {"kv_lens", kv_lens},
                 {"cu_seqlens_q", cu_seqlens_q}});
    return out;
  }
  check_offsets(op, "cu_seqlens_q", params.cu_seqlens_q, sequences, q.size(0));
  double pairs = 0; // of a query and a key
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t queries = params.cu_seqlens_q[b + 1] - params.cu_seqlens_q[b];
    check(queries <= max_seqlen_q, op, ": max_seqlen_q ", max_seqlen_q, ", but sequence ", b, " has ",
          queries, " queries");
    const int64_t kv_len = params.kv_lens[b];
    check(kv_len >= 0 && kv_len <= params.max_blocks * page_size, op, ": kv_lens[", b, "] is ", kv_len,
          "; takes 0 to ", params.max_blocks * page_size, ", what block_table has room for");
    pairs += static_cast<double>(queries) * kv_len;
    for (int64_t i = 0; i * page_size < kv_len; ++i) {
      const int64_t page = params.block_table[b * params.max_blocks + i];
      check(page >= 0 && page < k_pages.size(0), op, ": block_table[", b, ", ", i, "] is ", page,
            "; takes 0 to ", k_pages.size(0) - 1);
    }
  }
  const int64_t items = fastdllm::cpu::paged_attention_items(params);
  run_cpu(fastdllm::cpu::kernels().paged_attention, params, items,
          0.04 * pairs * q_heads * head_dim / std::max<int64_t>(items, 1));
  return out;
}

void unmask(const Tensor logits, const Tensor cu_rows, const Tensor positions, Tensor tokens, Tensor step_map,
            Tensor confidence, Tensor rows, const Tensor knobs, const Tensor quotas, const Tensor eos_ids,
            int64_t mask_id, bool filtered) {
  const char* op = "unmask";
  const Checker is{op, logits};
  const Dtype dtype = is.dtype(logits, "logits");
  is.shape(logits, "logits", {kAny, kAny});
  const int64_t logit_rows = logits.size(0), vocab = logits.size(1);
  check(vocab >= 2, op, ": logits has ", vocab, " columns; takes 2 or more");
  check(logits.stride(1) == 1, op, ": logits has strided columns");
  check(mask_id >= 0, op, ": mask_id ", mask_id, "; takes 0 or more");
  is.int64(tokens, "tokens", {kAny, kAny});
  const int64_t sequences = tokens.size(0), width = tokens.size(1);
  is.int32(cu_rows, "cu_rows", {sequences + 1});
  is.int64(positions, "positions", {logit_rows});
  is.int32(step_map, "step_map", {sequences, width});
  is.float32(confidence, "confidence", {sequences, width});
  is.int64(rows, "rows", {sequences, fastdllm::kRowFields});
  is.float32(knobs, "knobs", {sequences, fastdllm::kRowKnobs});
  is.int32(quotas, "quotas", {sequences, kAny});
  check(quotas.size(1) > 0, op, ": quotas has 0 columns; takes 1 or more");
  is.int64(eos_ids, "eos_ids", {kAny});

  Tensor candidate = torch::stable::new_empty(logits, {logit_rows}, ScalarType::Int);
  Tensor score = torch::stable::new_empty(logits, {logit_rows}, ScalarType::Float);
  Tensor floor = torch::stable::new_empty(logits, {filtered ? logit_rows : 0}, ScalarType::Float);
  fastdllm::UnmaskParams params{.logits = logits.const_data_ptr(),
                                .cu_rows = data<int32_t>(cu_rows),
                                .positions = data<int64_t>(positions),
                                .tokens = mutable_data<int64_t>(tokens),
                                .step_map = mutable_data<int32_t>(step_map),
                                .confidence = mutable_data<float>(confidence),
                                .rows = mutable_data<fastdllm::RowState>(rows),
                                .knobs = data<fastdllm::RowKnobs>(knobs),
                                .quotas = data<int32_t>(quotas),
                                .eos_ids = data<int64_t>(eos_ids),
                                .candidate = mutable_data<int32_t>(candidate),
                                .score = mutable_data<float>(score),
                                .floor = filtered ? mutable_data<float>(floor) : nullptr,
                                .partials = nullptr,
                                .logit_rows = logit_rows,
                                .sequences = sequences,
                                .vocab = vocab,
                                .width = width,
                                .logits_stride = logits.stride(0),
                                .quota_steps = quotas.size(1),
                                .eos_count = eos_ids.size(0),
                                .mask_id = mask_id,
                                .dtype = dtype};
  if (for_cuda(logits)) {
    Tensor partials =
        torch::stable::new_empty(logits, {fastdllm::cuda::unmask_partials(params)}, ScalarType::Float);
    params.partials = mutable_data<float>(partials);
    return launch_cuda(op, fastdllm::cuda::unmask, params,
                       {{"logits", logits},
                        {"cu_rows", cu_rows},
                        {"positions", positions},
                        {"tokens", tokens},
                        {"step_map", step_map},
                        {"confidence", confidence},
                        {"rows", rows},
                        {"knobs", knobs},
                        {"quotas", quotas},
                        {"eos_ids", eos_ids}});
  }
  check_offsets(op, "cu_rows", params.cu_rows, sequences, logit_rows);
  check_range(op, "positions", params.positions, logit_rows, 0, width);
  for (int64_t b = 0; b < sequences; ++b) {
    const fastdllm::RowState& row = params.rows[b];
    check(row.first >= 0 && row.first <= row.end && row.end <= width, op, ": rows[", b, "] has first ",
          row.first, " and end ", row.end, "; takes 0 <= first <= end <= ", width);
    check(row.block_step >= 0, op, ": rows[", b, "] has block_step ", row.block_step, "; takes 0 or more");
  }
  if (filtered)
    run_cpu(fastdllm::cpu::filter, params, logit_rows, 20.0 * vocab);
  run_cpu(fastdllm::cpu::kernels().score_logits, params, fastdllm::cpu::score_logits_items(params),
          0.2 * vocab);
  run_cpu(fastdllm::cpu::commit, params, sequences, 1e3);
}

// With a residual add_rms_norm, without one rms_norm.
Tensor normalise(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
  const Checker is{op, x};
  const Dtype dtype = is.dtype(x, "x");
  check(x.dim() >= 1, op, ": x is a scalar; takes [..., hidden]");
  const int64_t hidden = x.size(-1);
  check(hidden > 0, op, ": x has shape ", shape_text(x), "; takes rows of 1 or more");
  is.tensor(weight, "weight", x.scalar_type(), "that of x", {hidden});
  if (residual) {
    check(is_same_shape(*residual, x), op, ": residual has shape ", shape_text(*residual),
          "; takes that of x, ", shape_text(x));
    check(residual->is_contiguous(), op, ": residual is not contiguous");
    is.device(*residual, "residual");
    is.same_dtype(*residual, "residual");
  }
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const fastdllm::RmsNormParams params{.x = x.const_data_ptr(),
                                       .residual = residual ? residual->mutable_data_ptr() : nullptr,
                                       .weight = weight.const_data_ptr(),
                                       .out = out.mutable_data_ptr(),
                                       .rows = x.numel() / hidden,
                                       .hidden = hidden,
                                       .x_stride = is.row_stride(x, "x"),
                                       .eps = static_cast<float>(eps),
                                       .dtype = dtype};
  if (!for_cuda(x))
    run_cpu(fastdllm::cpu::kernels().rms_norm, params, params.rows, 0.3 * hidden);
  else if (residual)
    launch_cuda(op, fastdllm::cuda::rms_norm, params,
                {{"x", x}, {"residual", *residual}, {"weight", weight}});
  else
    launch_cuda(op, fastdllm::cuda::rms_norm, params, {{"x", x}, {"weight", weight}});
  return out;
}

Tensor rms_norm(const Tensor x, const Tensor weight, double eps) {
  return normalise("rms_norm", x, nullptr, weight, eps);
}

Tensor add_rms_norm(const Tensor x, Tensor residual, const Tensor weight, double eps) {
  return normalise("add_rms_norm", x, &residual, weight, eps);
}

Tensor silu_mul(const Tensor gate, const Tensor up) {
  const char* op = "silu_mul";
  const Checker is{op, gate};
  const Dtype dtype = is.dtype(gate, "gate");
  check(gate.dim() >= 1, op, ": gate is a scalar; takes [..., columns]");
  check(is_same_shape(up, gate), op, ": up has shape ", shape_text(up), "; takes that of gate, ",
        shape_text(gate));
  const int64_t columns = gate.size(-1);
  Tensor out = torch::stable::new_empty(gate, gate.sizes());
  const fastdllm::SiluMulParams params{.gate = gate.const_data_ptr(),
                                       .up = up.const_data_ptr(),
                                       .out = out.mutable_data_ptr(),
                                       .rows = columns ? gate.numel() / columns : 0,
                                       .columns = columns,
                                       .gate_stride = is.row_stride(gate, "gate"),
                                       .up_stride = is.row_stride(up, "up"),
                                       .dtype = dtype};
  if (for_cuda(gate))
    launch_cuda(op, fastdllm::cuda::silu_mul, params, {{"gate", gate}, {"up", up}});
  else
    run_cpu(fastdllm::cpu::kernels().silu_mul, params, params.rows, 0.5 * columns);
  return out;
}

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor x) {
  const char* op = "quantize_fp8";
  const Checker is{op, x};
  const Dtype dtype = is.dtype(x, "x");
  check(x.dim() >= 1, op, ": x is a scalar; takes [..., k]");
  const int64_t k = x.size(-1);
  check(k > 0, op, ": x has shape ", shape_text(x), "; takes rows of 1 or more");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  Tensor values = torch::stable::new_empty(x, shape, ScalarType::Float8_e4m3fn);
  shape.back() = 1;
  Tensor scales = torch::stable::new_empty(x, shape, ScalarType::Float);
  const fastdllm::QuantizeFp8Params params{.x = x.const_data_ptr(),
                                           .values = mutable_data<uint8_t>(values),
                                           .scales = mutable_data<float>(scales),
                                           .rows = x.numel() / k,
                                           .k = k,
                                           .x_stride = is.row_stride(x, "x"),
                                           .dtype = dtype};
  if (for_cuda(x))
    launch_cuda(op, fastdllm::cuda::quantize_fp8, params, {{"x", x}});
  else
    run_cpu(fastdllm::cpu::kernels().quantize_fp8, params, params.rows, 0.3 * k);
  return {values, scales};
}

#ifndef FASTDLLM_SIMT
Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The weight of a gated product is that of the gate, then that of the up. An int8 weight has scales.
Tensor multiply(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& scales, bool gated) {
  const Checker is{op, x};
  const bool is_half = x.scalar_type() == ScalarType::Half;
  const Dtype dtype = is_half && !gated && !scales ? Dtype::kFloat16 : is.dtype(x, "x");
  check(x.dim() >= 1, op, ": x is a scalar; takes [..., k]");
  const int64_t k = x.size(-1);
  check(k > 0, op, ": x has shape ", shape_text(x), "; takes rows of 1 or more");
  is.shape(weight, "weight", {kAny, k});
  is.device(weight, "weight");
  if (scales) {
    constexpr int64_t kMostColumns = 1 << 16; // whose exact sums fit in 32 bits
    check(weight.scalar_type() == ScalarType::Char, op, ": weight has another dtype; with scales takes int8");
    check(!for_cuda(x), op, ": weight is int8 on CUDA; takes the CPU");
    check(k <= kMostColumns, op, ": weight has shape ", shape_text(weight), "; as int8 takes rows of up to ",
          kMostColumns);
    is.float32(*scales, "scales", {weight.size(0)});
  } else {
    is.same_dtype(weight, "weight");
  }
  check(k == 1 || weight.stride(1) == 1, op, ": weight has strided columns");
  check(!gated || weight.size(0) % 2 == 0, op, ": weight has ", weight.size(0),
        " rows; takes those of the gate and as many of the up");
  if (bias)
    is.tensor(*bias, "bias", x.scalar_type(), "that of x", {weight.size(0)});
  const int64_t n = weight.size(0) / (gated ? 2 : 1), rows = x.numel() / k, x_stride = is.row_stride(x, "x");
  if (!scales && (for_cuda(x) || is_half || rows > fastdllm::cpu::linear_rows(dtype))) {
    // oneDNN reads what lies between strided rows of odd length: NaN there would reach the result.
    const bool is_dense = for_cuda(x) || x_stride == k;
    Tensor out = torch_linear(is_dense ? x : torch::stable::contiguous(x), weight, bias);
    return gated ? silu_mul(torch::stable::narrow(out, -1, 0, n), torch::stable::narrow(out, -1, n, n)) : out;
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor out = torch::stable::new_empty(x, shape);
  const fastdllm::LinearParams params{.x = x.const_data_ptr(),
                                      .weight = weight.const_data_ptr(),
                                      .scales = scales ? data<float>(*scales) : nullptr,
                                      .bias = bias ? bias->const_data_ptr() : nullptr,
                                      .out = out.mutable_data_ptr(),
                                      .rows = rows,
                                      .n = n,
                                      .k = k,
                                      .x_stride = x_stride,
                                      .weight_stride = weight.stride(0),
                                      .gated = gated,
                                      .dtype = dtype};
  if (rows > 0)
    run_cpu(fastdllm::cpu::kernels().linear, params, fastdllm::cpu::linear_items(params),
            (5 + 0.2 * std::min(rows, fastdllm::cpu::linear_rows(dtype))) * k);
  return out;
}

Tensor linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
              const std::optional<Tensor> scales) {
  return multiply("linear", x, weight, bias, scales, false);
}

Tensor linear_silu_mul(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
                       const std::optional<Tensor> scales) {
  return multiply("linear_silu_mul", x, weight, bias, scales, true);
}
#endif

void copy_pages(Tensor pages, const Tensor src, const Tensor dst) {
  const char* op = "copy_pages";
  const Checker is{op, pages};
  check(pages.dim() >= 2, op, ": pages has shape ", shape_text(pages), "; takes [outer, pages, ...]");
  check(pages.is_contiguous(), op, ": pages is not contiguous");
  is.int64(src, "src", {kAny});
  is.int64(dst, "dst", {src.size(0)});
  const int64_t outer = pages.size(0), num_pages = pages.size(1), pairs = src.size(0);
  const int64_t outer_bytes = outer ? pages.numel() / outer * pages.element_size() : 0;
  const fastdllm::CopyPagesParams params{.pages = pages.mutable_data_ptr(),
                                         .src = data<int64_t>(src),
                                         .dst = data<int64_t>(dst),
                                         .pairs = pairs,
                                         .outer = outer,
                                         .outer_stride_bytes = outer_bytes,
                                         .page_bytes = num_pages ? outer_bytes / num_pages : 0};
  if (for_cuda(pages))
    return launch_cuda(op, fastdllm::cuda::copy_pages, params,
                       {{"pages", pages}, {"src", src}, {"dst", dst}});
  check_range(op, "src", params.src, pairs, 0, num_pages);
  check_range(op, "dst", params.dst, pairs, 0, num_pages);
  for (int64_t i = 0; i < pairs; ++i)
    for (int64_t j = 0; j < pairs; ++j)
      check((i == j || params.dst[i] != params.dst[j]) && params.dst[i] != params.src[j], op, ": dst[", i,
            "] = ", params.dst[i], " is written twice or also read");
  run_cpu(fastdllm::cpu::copy_pages, params, pairs * outer, 0.1 * params.page_bytes);
}

} // namespace

// Expands its first argument, which torch's own macros do not.
#define FASTDLLM_TORCH_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FASTDLLM_TORCH_LIBRARY_IMPL(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

FASTDLLM_TORCH_LIBRARY(FASTDLLM_LIBRARY, m) {
  m.def("rope_write_kv(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor slots, "
        "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> "
        "Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor kv_lens, "
      "Tensor cu_seqlens_q, int max_seqlen_q, float scale, Tensor? k_scales=None, Tensor? v_scales=None) -> "
      "Tensor");
  m.def("unmask(Tensor logits, Tensor cu_rows, Tensor positions, Tensor(a!) tokens, Tensor(b!) step_map, "
        "Tensor(c!) confidence, Tensor(d!) rows, Tensor knobs, Tensor quotas, Tensor eos_ids, int mask_id, "
        "bool filtered=False) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("quantize_fp8(Tensor x) -> (Tensor, Tensor)");
  m.def("copy_pages(Tensor(a!) pages, Tensor src, Tensor dst) -> ()");
#ifndef FASTDLLM_SIMT
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scales=None) -> Tensor");
  m.def("linear_silu_mul(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scales=None) -> Tensor");
#endif
}

#define FASTDLLM_REGISTER(m)                                                                                 \
  m.impl("rope_write_kv", TORCH_BOX(&rope_write_kv));                                                        \
  m.impl("paged_attention", TORCH_BOX(&paged_attention));                                                    \
  m.impl("unmask", TORCH_BOX(&unmask));                                                                      \
  m.impl("rms_norm", TORCH_BOX(&rms_norm));                                                                  \
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));                                                          \
  m.impl("silu_mul", TORCH_BOX(&silu_mul));                                                                  \
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));                                                          \
  m.impl("copy_pages", TORCH_BOX(&copy_pages));                                                              \
  FASTDLLM_REGISTER_LINEAR(m)
#ifdef FASTDLLM_SIMT // they have no CUDA kernels of ours
#define FASTDLLM_REGISTER_LINEAR(m)
#else
#define FASTDLLM_REGISTER_LINEAR(m)                                                                          \
  m.impl("linear", TORCH_BOX(&linear));                                                                      \
  m.impl("linear_silu_mul", TORCH_BOX(&linear_silu_mul))
#endif

FASTDLLM_TORCH_LIBRARY_IMPL(FASTDLLM_LIBRARY, CPU, m) { FASTDLLM_REGISTER(m); }
FASTDLLM_TORCH_LIBRARY_IMPL(FASTDLLM_LIBRARY, CUDA, m) { FASTDLLM_REGISTER(m); }
