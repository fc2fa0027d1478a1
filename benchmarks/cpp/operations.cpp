#include "operations.h"

#include <algorithm>
#include <bit>
#include <random>

namespace fastdllm::bench {
namespace {

constexpr int64_t kBlock = 32, kPageSize = 32, kHeadDim = 128;

struct Model {
  const char* name;
  int64_t q_heads, kv_heads, hidden, intermediate, vocab;
};
constexpr Model kModels[] = {{"llada-8b", 32, 32, 4096, 12288, 126464},
                             {"dream-7b", 28, 4, 3584, 18944, 152064}};
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16};

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

std::string label(const char* op, const Model& model, Dtype dtype, int64_t batch) {
  return std::string(op) + '/' + model.name + (dtype == Dtype::kFloat32 ? "/float32" : "/bfloat16") +
         "/batch:" + std::to_string(batch);
}

// Standard normal numbers.
const std::vector<float>& normal() {
  static const std::vector<float> numbers = [] {
    std::mt19937 engine(0);
    std::normal_distribution<float> draw;
    std::vector<float> x(1 << 22);
    std::generate(x.begin(), x.end(), [&] { return draw(engine); });
    return x;
  }();
  return numbers;
}

// The same, cut to bfloat16.
const std::vector<uint16_t>& narrow_normal() {
  static const std::vector<uint16_t> numbers = [] {
    std::vector<uint16_t> x;
    for (const float number : normal())
      x.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(number) >> 16));
    return x;
  }();
  return numbers;
}

template <class T> std::vector<T> count_up(int64_t size, T step = 1) {
  std::vector<T> x(static_cast<size_t>(size));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<T>(i) * step;
  return x;
}

template <class T> std::vector<T> shuffled(int64_t size) {
  auto x = count_up<T>(size);
  std::shuffle(x.begin(), x.end(), std::mt19937(1));
  return x;
}

// The data of a case on its backend.
class Data {
public:
  Data(Backend& backend, int64_t set_bytes) : backend_(backend) {
    constexpr int64_t kCaches = 4, kMost = int64_t{3} << 29;
    const int64_t wanted = std::min(kCaches * backend.cache_bytes(), kMost);
    sets_ = static_cast<int>(std::max<int64_t>(2, (wanted + set_bytes - 1) / set_bytes));
  }

  void* blank(int64_t bytes) {
    memory_.push_back(backend_.allocate(std::max<int64_t>(bytes, 1)));
    return memory_.back().get();
  }
  float* scratch(int64_t floats) { return static_cast<float*>(blank(floats * sizeof(float))); }

  template <class T> T* upload(const std::vector<T>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    void* data = blank(bytes);
    backend_.upload(data, values.data(), bytes);
    return static_cast<T*>(data);
  }

  // Random numbers, the same few million over and over.
  char* random(Dtype dtype, int64_t elements) {
    const void* source = normal().data();
    if (dtype != Dtype::kFloat32)
      source = narrow_normal().data();
    const int64_t bytes = elements * size_of(dtype);
    int64_t filled = std::min(bytes, static_cast<int64_t>(normal().size()) * size_of(dtype));
    char* data = static_cast<char*>(blank(bytes));
    backend_.upload(data, source, filled);
    while (filled < bytes) {
      const int64_t more = std::min(filled, bytes - filled);
      backend_.copy(data + filled, data, more);
      filled += more;
    }
    return data;
  }
  // One for each set.
  std::vector<char*> randoms(Dtype dtype, int64_t elements) {
    std::vector<char*> x(static_cast<size_t>(sets_));
    std::generate(x.begin(), x.end(), [&] { return random(dtype, elements); });
    return x;
  }

  Case with(const Call& call) { return {call, sets_, std::move(memory_)}; }

private:
  Backend& backend_;
  int sets_;
  std::vector<std::shared_ptr<void>> memory_;
};

// ---------------------------------------------------------------------------------------------------------
// Operations
// ---------------------------------------------------------------------------------------------------------

Operation paged_attention(const Model& model, Dtype dtype, int64_t batch, int64_t context) {
  const int64_t tokens = batch * kBlock, pages = batch * context / kPageSize;
  const int64_t pool = pages * model.kv_heads * kPageSize * kHeadDim,
                rows = tokens * model.q_heads * kHeadDim;
  const int64_t set_bytes = 2 * pool * size_of(dtype);
  const auto make = [=](Backend& backend) {
    Data data(backend, set_bytes);
    const auto keys = data.randoms(dtype, pool), values = data.randoms(dtype, pool);
    PagedAttentionParams p{};
    p.q = data.random(dtype, rows);
    p.block_table = data.upload(shuffled<int32_t>(pages));
    p.kv_lens = data.upload(std::vector<int32_t>(batch, static_cast<int32_t>(context)));
    p.cu_seqlens_q = data.upload(count_up<int32_t>(batch + 1, kBlock));
    p.out = data.blank(rows * size_of(dtype));
    p.tokens = tokens;
    p.sequences = batch;
    p.max_blocks = pages / batch;
    p.max_seqlen_q = kBlock;
    p.q_heads = model.q_heads;
    p.kv_heads = model.kv_heads;
    p.head_dim = kHeadDim;
    p.page_size = kPageSize;
    p.scale = 0.088388f;
    p.dtype = dtype;
    p.scratch = data.scratch(backend.scratch(p));
    return data.with([=, &backend](int set) {
      PagedAttentionParams on = p;
      on.k_pages = keys[set];
      on.v_pages = values[set];
      backend.run(on);
    });
  };
  return {label("paged_attention", model, dtype, batch) + "/context:" + std::to_string(context),
          set_bytes + 2 * rows * size_of(dtype), set_bytes, make};
}

Operation unmask(const Model& model, Dtype dtype, int64_t batch) {
  const int64_t rows = batch * kBlock, set_bytes = rows * model.vocab * size_of(dtype);
  const auto make = [=](Backend& backend) {
    Data data(backend, set_bytes);
    const auto logits = data.randoms(dtype, rows * model.vocab);
    std::vector<int64_t> positions;
    for (int64_t r = 0; r < rows; ++r)
      positions.push_back(r % kBlock);
    // More masks than steps will be taken, and all positions are masked again: every call finds the same
    // work.
    RowState state{};
    state.rule = static_cast<int64_t>(Rule::kThreshold);
    state.end = kBlock;
    state.masks_left = int64_t{1} << 40;
    RowKnobs knobs{};
    knobs.value = 0.9f;
    knobs.softmax_temperature = 1;
    UnmaskParams p{};
    p.cu_rows = data.upload(count_up<int32_t>(batch + 1, kBlock));
    p.positions = data.upload(positions);
    const std::vector<int64_t> masks(rows, model.vocab - 1);
    const int64_t* masked = data.upload(masks);
    p.tokens = data.upload(masks);
    p.step_map = data.upload(std::vector<int32_t>(rows));
    p.confidence = data.upload(std::vector<float>(rows));
    p.rows = data.upload(std::vector<RowState>(batch, state));
    p.knobs = data.upload(std::vector<RowKnobs>(batch, knobs));
    p.quotas = data.upload(std::vector<int32_t>(batch, 1));
    p.quota_steps = 1;
    p.eos_ids = data.upload(std::vector<int64_t>{1});
    p.candidate = data.upload(std::vector<int32_t>(rows));
    p.score = data.upload(std::vector<float>(rows));
    p.logit_rows = rows;
    p.sequences = batch;
    p.vocab = model.vocab;
    p.width = kBlock;
    p.logits_stride = model.vocab;
    p.eos_count = 1;
    p.mask_id = model.vocab - 1;
    p.dtype = dtype;
    p.partials = data.scratch(backend.scratch(p));
    return data.with([=, &backend](int set) {
      backend.copy(p.tokens, masked, rows * static_cast<int64_t>(sizeof(int64_t))); // its time counts
      UnmaskParams on = p;
      on.logits = logits[set];
      backend.run(on);
    });
  };
  return {label("unmask", model, dtype, batch), set_bytes, set_bytes, make};
}

Operation rope_write_kv(const Model& model, Dtype dtype, int64_t batch) {
  const int64_t tokens = batch * kBlock, row = (model.q_heads + 2 * model.kv_heads) * kHeadDim;
  const int64_t set_bytes = 2 * tokens * row * size_of(dtype);
  const auto make = [=](Backend& backend) {
    Data data(backend, set_bytes);
    const int64_t q_row = model.q_heads * kHeadDim, kv_row = model.kv_heads * kHeadDim;
    const auto qkv = data.randoms(dtype, tokens * row); // one product: q, k, v side by side
    const auto q_out = data.randoms(dtype, tokens * q_row);
    const auto keys = data.randoms(dtype, tokens * kv_row), values = data.randoms(dtype, tokens * kv_row);
    RopeWriteKvParams p{};
    p.cos = p.sin = reinterpret_cast<const float*>(data.random(Dtype::kFloat32, tokens * kHeadDim / 2));
    p.positions = p.slots = data.upload(count_up<int64_t>(tokens));
    p.tokens = tokens;
    p.q_heads = model.q_heads;
    p.kv_heads = model.kv_heads;
    p.head_dim = p.rotary_dim = kHeadDim;
    p.page_size = kPageSize;
    p.q_stride = p.k_stride = p.v_stride = row;
    p.dtype = dtype;
    return data.with([=, &backend](int set) {
      RopeWriteKvParams on = p;
      on.q = qkv[set];
      on.k = qkv[set] + q_row * size_of(dtype);
      on.v = qkv[set] + (q_row + kv_row) * size_of(dtype);
      on.q_out = q_out[set];
      on.k_pages = keys[set];
      on.v_pages = values[set];
      backend.run(on);
    });
  };
  return {label("rope_write_kv", model, dtype, batch), set_bytes, set_bytes, make};
}

Operation add_rms_norm(const Model& model, Dtype dtype, int64_t batch) {
  const int64_t rows = batch * kBlock, set_bytes = 4 * rows * model.hidden * size_of(dtype);
  const auto make = [=](Backend& backend) {
    Data data(backend, set_bytes);
    const auto x = data.randoms(dtype, rows * model.hidden), out = data.randoms(dtype, rows * model.hidden);
    const auto residual = data.randoms(dtype, rows * model.hidden);
    RmsNormParams p{};
    p.weight = data.random(dtype, model.hidden);
    p.rows = rows;
    p.hidden = p.x_stride = model.hidden;
    p.eps = 1e-5f;
    p.dtype = dtype;
    return data.with([=, &backend](int set) {
      RmsNormParams on = p;
      on.x = x[set];
      on.residual = residual[set];
      on.out = out[set];
      backend.run(on);
    });
  };
  return {label("add_rms_norm", model, dtype, batch), set_bytes, set_bytes, make};
}

Operation silu_mul(const Model& model, Dtype dtype, int64_t batch) {
  const int64_t rows = batch * kBlock, set_bytes = 3 * rows * model.intermediate * size_of(dtype);
  const auto make = [=](Backend& backend) {
    Data data(backend, set_bytes);
    const auto gate_up = data.randoms(dtype, 2 * rows * model.intermediate); // one product, side by side
    const auto out = data.randoms(dtype, rows * model.intermediate);
    SiluMulParams p{};
    p.rows = rows;
    p.columns = model.intermediate;
    p.gate_stride = p.up_stride = 2 * model.intermediate;
    p.dtype = dtype;
    return data.with([=, &backend](int set) {
      SiluMulParams on = p;
      on.gate = gate_up[set];
      on.up = gate_up[set] + model.intermediate * size_of(dtype);
      on.out = out[set];
      backend.run(on);
    });
  };
  return {label("silu_mul", model, dtype, batch), set_bytes, set_bytes, make};
}

// Every page of a sequence of 2,048 positions, in one layer's keys and values.
Operation copy_pages(const Model& model, Dtype dtype, int64_t batch) {
  constexpr int64_t kOuter = 2;
  const int64_t pairs = batch * 2048 / kPageSize;
  const int64_t page_bytes = model.kv_heads * kPageSize * kHeadDim * size_of(dtype);
  const int64_t set_bytes = kOuter * 2 * pairs * page_bytes;
  const auto make = [=](Backend& backend) {
    Data data(backend, set_bytes);
    const auto pools = data.randoms(dtype, set_bytes / size_of(dtype));
    const auto pages = shuffled<int64_t>(2 * pairs);
    CopyPagesParams p{};
    p.src = data.upload(std::vector<int64_t>(pages.begin(), pages.begin() + pairs));
    p.dst = data.upload(std::vector<int64_t>(pages.begin() + pairs, pages.end()));
    p.pairs = pairs;
    p.outer = kOuter;
    p.outer_stride_bytes = 2 * pairs * page_bytes;
    p.page_bytes = page_bytes;
    return data.with([=, &backend](int set) {
      CopyPagesParams on = p;
      on.pages = pools[set];
      backend.run(on);
    });
  };
  return {label("copy_pages", model, dtype, batch), set_bytes, set_bytes, make};
}

} // namespace

std::vector<Operation> operations() {
  std::vector<Operation> all;
  for (const Model& model : kModels)
    for (const Dtype dtype : kDtypes)
      for (const int64_t batch : {1, 4, 16, 64}) {
        for (const int64_t context : {512, 2048, 8192, 32768})
          all.push_back(paged_attention(model, dtype, batch, context));
        for (const auto make : {unmask, rope_write_kv, add_rms_norm, silu_mul, copy_pages})
          all.push_back(make(model, dtype, batch));
      }
  std::stable_sort(all.begin(), all.end(), [](const Operation& a, const Operation& b) {
    return a.name.substr(0, a.name.find('/')) < b.name.substr(0, b.name.find('/'));
  });
  return all;
}

} // namespace fastdllm::bench
