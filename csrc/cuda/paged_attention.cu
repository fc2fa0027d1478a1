// paged_attention: out = softmax(scale q K^T) V, bidirectional, over the pages of each sequence.
//
//   q, out             [tokens, q_heads, head_dim]
//   k_pages, v_pages   [pages, kv_heads, page_size, head_dim]
//   block_table [sequences, max_blocks], kv_lens [sequences], cu_seqlens_q [sequences + 1]
//
// Blocks (x, y, z): z is a sequence, y a KV head, x a tile of rows and a split of the keys
// (attention_pipeline.h). The last z zeroes the tokens outside of all sequences. The rows of a sequence
// decide which of up to three kernels takes it, so that its bits do not depend on the batch: each launch
// passes over the sequences of the others. Where keys are split, merge_splits adds up the partial results by
// an exact log-sum-exp.
//
// Bytes: K and V of a sequence once for each tile of rows, from memory the first time. A block step of 32
// queries without groups is one tile of 32 rows: bound by those bytes. Partial results are a quarter as many
// for splits of 256 keys, and fewer for longer ones.
//
// Keys and values come by cp.async; FASTDLLM_CUDA_COPY=bulk has the kernel of up to 32 rows take Hopper's
// bulk copies instead, for measuring. The bits are the same. Pages of fp8 come by cp.async, half the bytes,
// and are widened in shared memory (attention_fp8.h); scores and weights are multiplied with their scales.
//
// Assumes q_heads % kv_heads == 0, head_dim a multiple of 8 up to 256, pages of 16, 32 or 64. Keys at
// kv_lens[b] and after are never used. No atomics.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cuda/attention_fp8.h"
#include "cuda/attention_tiles.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr float kLog2e = 0x1.715476p+0f;

// How keys and values come.
struct Async {
  template <class Tile> using Loader = KeyLoader<typename Tile::Element, Tile::kDim, Tile::kKeys, false>;
};
struct Bulk {
  template <class Tile> using Loader = KeyLoader<typename Tile::Element, Tile::kDim, Tile::kKeys, true>;
};
struct Fp8 {
  template <class Tile> using Loader = Fp8Loader<typename Tile::Element, Tile::kDim, Tile::kKeys>;
};
template <class Tile, class Way> using LoaderOf = typename Way::template Loader<Tile>;

template <class Tile, class Way> struct SharedStart {
  uint64_t barriers[kMaxStages];
  alignas(16) SharedRow<typename Tile::Element, Tile::kDim> q[Tile::kRows];
  typename Tile::Extra extra;
  typename LoaderOf<Tile, Way>::Rows rows;
};
template <class Tile, class Way> constexpr size_t shared_bytes(int stages) {
  return sizeof(SharedStart<Tile, Way>) + stages * sizeof(typename LoaderOf<Tile, Way>::Stage);
}

template <class T>
__device__ void zero_rows(const PagedAttentionParams& p, const AttentionPlan& plan, int64_t first_token,
                          int kv_head, int first_row, int rows) {
  for (int r = threadIdx.x / kWarp; r < rows; r += kAttentionThreads / kWarp)
    for (int d = threadIdx.x % kWarp; d < p.head_dim; d += kWarp)
      static_cast<T*>(p.out)[row_offset(p, plan, first_token, kv_head, first_row + r) + d] = T{};
}

template <class Tile, class Way>
__global__ void __launch_bounds__(kAttentionThreads, kBlocksAtATime)
    attend(PagedAttentionParams p, AttentionPlan plan) {
  using T = typename Tile::Element;
  using Loader = LoaderOf<Tile, Way>;
  static_assert(Tile::kMergeBytes <= 2 * sizeof(typename Loader::Stage));
  constexpr int kDim = Tile::kDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  const int64_t b = blockIdx.z;
  const int kv_head = static_cast<int>(blockIdx.y), head_dim = static_cast<int>(p.head_dim);
  if (b == p.sequences) {
    for (int64_t token = p.cu_seqlens_q[b] + blockIdx.x; token < p.tokens && plan.above == 0;
         token += gridDim.x)
      zero_rows<T>(p, plan, token, kv_head, 0, plan.group);
    return;
  }
  const SequenceWork work(p, plan, b, kRows, kKeys);
  const int row_tile = static_cast<int>(blockIdx.x) / work.splits;
  const int split = static_cast<int>(blockIdx.x) % work.splits;
  if (row_tile >= work.row_tiles)
    return;
  const int first_row = row_tile * kRows, rows = Least{}(work.rows - first_row, kRows);
  if (work.tiles == 0)
    return zero_rows<T>(p, plan, work.first_token, kv_head, first_row, rows);

  auto& shared = shared_memory<SharedStart<Tile, Way>>();
  auto* stages = reinterpret_cast<typename Loader::Stage*>(&shared + 1);
  Loader loader(p, b, kv_head);
  const int first_tile = split * work.tiles_per_split;
  const int end_tile = Least{}(first_tile + work.tiles_per_split, work.tiles);

  if constexpr (Loader::kIsBulk) {
    if (threadIdx.x == 0)
      unroll<kMaxStages>([&](int i) { mbarrier_init(&shared.barriers[i], 1); });
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kRows * (kDim / kVector<T>); i += kAttentionThreads) {
    const int row = i / (kDim / kVector<T>), column = i % (kDim / kVector<T>)*kVector<T>;
    const bool inside = row < rows && column < head_dim;
    const T* from = static_cast<const T*>(p.q);
    if (inside)
      from += row_offset(p, plan, work.first_token, kv_head, first_row + row) + column;
    cp_async_16(&shared.q[row].x[column], from, inside);
  }
  loader.clear_padding(stages, plan.stages);
  loader.find_pages(first_tile);
  for (int i = 0; i < plan.stages - 1; ++i) {
    if (first_tile + i < end_tile) {
      loader.load(stages[i], first_tile + i, &shared.barriers[i]);
      loader.find_pages(first_tile + i + 1);
    }
    cp_async_commit();
  }

  Tile tile;
  int stage = 0, round = 0; // of `t`; the barrier's phase
  for (int t = first_tile; t < end_tile; ++t) {
    const int next = t + plan.stages - 1, next_stage = stage > 0 ? stage - 1 : plan.stages - 1;
    if constexpr (Loader::kIsBulk) {
      cp_async_wait<0>(); // the queries
      mbarrier_wait(&shared.barriers[stage], round & 1);
    } else if (plan.stages == 2) {
      cp_async_wait<0>();
    } else {
      cp_async_wait<1>();
    }
    __syncthreads(); // tile t is there for all, and all are done with t - 1, whose stage is filled next
    if (next < end_tile) {
      loader.load(stages[next_stage], next, &shared.barriers[next_stage]);
      loader.find_pages(next + 1);
    }
    cp_async_commit();
    if (t == first_tile)
      tile.begin(shared.q, shared.extra);
    const int keys = work.kv_len - t * kKeys;
    if constexpr (Loader::kWidens) {
      loader.widen(stages[stage], shared.rows, t);
      __syncthreads(); // the rows are there for all
      tile.step(shared.rows, keys, p.scale * kLog2e, shared.extra);
    } else {
      tile.step(stages[stage], keys, p.scale * kLog2e, shared.extra);
    }
    if (++stage == plan.stages) {
      stage = 0;
      ++round;
    }
  }

  float* partial =
      work.splits > 1 ? partial_rows(p, plan, work, b, kv_head, row_tile, split, kRows) : nullptr;
  tile.finish(rows, head_dim, stages, [&](int row, float largest, float sum) {
    return RowWriter<T>(static_cast<T*>(p.out) +
                            row_offset(p, plan, work.first_token, kv_head, first_row + row),
                        partial ? partial + row * (p.head_dim + 2) : nullptr, head_dim, largest, sum);
  });
}

// A warp a row: out = sum_s w_s o_s / sum_s w_s sum_s with w_s = 2^(largest_s - largest of all).
template <class Tile>
__global__ void __launch_bounds__(kAttentionThreads)
    merge_splits(PagedAttentionParams p, AttentionPlan plan) {
  using T = typename Tile::Element;
  const int64_t b = blockIdx.y;
  const SequenceWork work(p, plan, b, Tile::kRows, Tile::kKeys);
  const int item = static_cast<int>(blockIdx.x * (kAttentionThreads / kWarp) + threadIdx.x / kWarp);
  if (work.splits == 1 || item >= work.rows * p.kv_heads)
    return;
  const int kv_head = item / work.rows, row = item % work.rows;
  const int lane = threadIdx.x % kWarp, head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = Tile::kRows * (p.head_dim + 2); // between splits
  const float* partial = partial_rows(p, plan, work, b, kv_head, row / Tile::kRows, 0, Tile::kRows) +
                         row % Tile::kRows * (p.head_dim + 2);
  float largest = -kLargest, sum = 0;
  if (lane < work.splits) {
    largest = partial[lane * stride + head_dim];
    sum = partial[lane * stride + head_dim + 1];
  }
  const float weight = exp2f(largest - warp_reduce(largest, Largest{}));
  const float factor = 1.0f / warp_reduce(weight * sum, Sum{});
  T* out = static_cast<T*>(p.out) + row_offset(p, plan, work.first_token, kv_head, row);
  constexpr int kColumns = Tile::kDim / kWarp;
  float o[kColumns] = {};
  for (int s = 0; s < work.splits; ++s) {
    const float w = __shfl_sync(kAllLanes, weight, s);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane + c * kWarp < head_dim)
        o[c] += w * partial[s * stride + lane + c * kWarp];
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (lane + c * kWarp < head_dim)
      out[lane + c * kWarp] = from_float<T>(o[c] * factor);
}

// ---------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------

struct DeviceFacts {
  int multiprocessors = 0, shared_of_block = 0, shared_of_all = 0, major = 0;
};

const char* device_facts(DeviceFacts& facts) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(facts.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(facts.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(facts.shared_of_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(facts.major, cudaDevAttrComputeCapabilityMajor);
  return error_text(error);
}

// Rows of a tile in the kernel that takes a sequence of so many rows.
constexpr int64_t kNarrowRows = 32, kMiddleRows = 64, kWideRows = 128;

int64_t longest_rows(const PagedAttentionParams& p) { return p.max_seqlen_q * (p.q_heads / p.kv_heads); }

// Tiles of partial results that any sequence needs at most; a kernel of fewer rows a tile needs no more.
int64_t partial_tiles(const PagedAttentionParams& p, const DeviceFacts& facts, int64_t rows) {
  const int64_t row_tiles = (longest_rows(p) + rows - 1) / rows;
  return std::min<int64_t>(facts.multiprocessors * kBlocksAtATime, p.kv_heads * row_tiles * kMaxSplits);
}
int64_t most_tile_rows(const PagedAttentionParams& p) {
  const int64_t rows = longest_rows(p);
  return rows <= kNarrowRows ? kNarrowRows : rows <= kMiddleRows ? kMiddleRows : kWideRows;
}

struct Launcher {
  const PagedAttentionParams& p;
  const DeviceFacts& facts;
  cudaStream_t stream;

  // Three stages where kBlocksAtATime blocks have room for them; two always have it for one (99 KiB).
  template <class Tile, class Way> int stages() const {
    constexpr size_t kReserved = 1 << 10, kLeastOfBlock = 99 << 10; // bytes a block
    static_assert(shared_bytes<Tile, Way>(2) <= kLeastOfBlock);
    const size_t bytes = shared_bytes<Tile, Way>(kMaxStages);
    const bool fit = bytes <= static_cast<size_t>(facts.shared_of_block) &&
                     (bytes + kReserved) * kBlocksAtATime <= static_cast<size_t>(facts.shared_of_all);
    return fit ? kMaxStages : 2;
  }

  // Sequences with more than `above` and at most `upto` rows.
  template <class Tile, class Way> const char* run(int64_t above, int64_t upto) const {
    const int64_t rows = std::min(longest_rows(p), upto);
    if (rows <= above && above > 0) // the first launch also zeroes the tokens outside of all sequences
      return nullptr;
    AttentionPlan plan{};
    plan.above = static_cast<int>(above);
    plan.upto = static_cast<int>(upto);
    plan.group = static_cast<int>(p.q_heads / p.kv_heads);
    plan.slots = facts.multiprocessors * kBlocksAtATime;
    plan.tiles_per_sequence = static_cast<int>(partial_tiles(p, facts, most_tile_rows(p)));
    plan.stages = stages<Tile, Way>();
    // row tiles times splits is at most their number without splits, or what fills the device
    const int64_t row_tiles = rows > 0 ? (rows + Tile::kRows - 1) / Tile::kRows : 1;
    const int64_t filling = std::min(plan.slots / p.kv_heads, row_tiles * kMaxSplits);
    const dim3 grid(grid_size(std::max(row_tiles, filling)), grid_size(p.kv_heads),
                    grid_size(p.sequences + 1));
    if (const char* error = launch(attend<Tile, Way>, grid, kAttentionThreads,
                                   shared_bytes<Tile, Way>(plan.stages), stream, p, plan))
      return error;
    const int64_t split_rows =
        std::min<int64_t>(rows * p.kv_heads, plan.slots / 2 * Tile::kRows); // at most, of all heads
    if (filling < 2 || split_rows == 0 || p.sequences == 0)
      return nullptr;
    constexpr int kWarps = kAttentionThreads / kWarp;
    const dim3 merge_grid(grid_size((split_rows + kWarps - 1) / kWarps), grid_size(p.sequences));
    return launch(merge_splits<Tile>, merge_grid, kAttentionThreads, 0, stream, p, plan);
  }

  template <class T, int kDim> const char* run_all() const {
    return p.k_scales ? run_tiles<T, kDim, Fp8>() : run_tiles<T, kDim, Async>();
  }

  template <class T, int kDim, class Way> const char* run_tiles() const {
    constexpr int64_t kNoEnd = 0x7fffffff;
    if constexpr (sizeof(T) == 4) {
      return run<FloatTile<kDim>, Way>(0, kNoEnd);
    } else {
      using Narrow = TensorTile<T, kDim, 2, 1>;
      static_assert(Narrow::kRows == kNarrowRows);
      constexpr bool kHasOthers = kDim <= 128; // beyond, registers and shared memory allow no more rows
      const int64_t upto = kHasOthers ? kNarrowRows : kNoEnd;
      const char* copy = std::getenv("FASTDLLM_CUDA_COPY");
      const bool bulk = copy && std::strcmp(copy, "bulk") == 0 && facts.major >= 9 && !p.k_scales;
      const char* error = bulk ? run<Narrow, Bulk>(0, upto) : run<Narrow, Way>(0, upto);
      if constexpr (kHasOthers) {
        using Middle = TensorTile<T, kDim, 4, 1>;
        using Wide = TensorTile<T, kDim, 4, 2>;
        static_assert(Middle::kRows == kMiddleRows && Wide::kRows == kWideRows);
        if (!error)
          error = run<Middle, Way>(kNarrowRows, kMiddleRows);
        if (!error)
          error = run<Wide, Way>(kMiddleRows, kNoEnd);
      }
      return error;
    }
  }
};

} // namespace

int64_t paged_attention_scratch(const PagedAttentionParams& p) {
  DeviceFacts facts;
  if (device_facts(facts) || p.kv_heads == 0 || p.q_heads == 0)
    return 0;
  const int64_t rows = most_tile_rows(p);
  return p.sequences * partial_tiles(p, facts, rows) * rows * (p.head_dim + 2);
}

const char* paged_attention(const PagedAttentionParams& p, void* stream) {
  if (p.head_dim > 256)
    return "head_dim is above 256";
  if (p.tokens == 0 || p.q_heads == 0)
    return nullptr;
  DeviceFacts facts;
  if (const char* error = device_facts(facts))
    return error;
  const Launcher launcher{p, facts, static_cast<cudaStream_t>(stream)};
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return p.head_dim <= 64    ? launcher.run_all<T, 64>()
           : p.head_dim <= 96  ? launcher.run_all<T, 96>()
           : p.head_dim <= 128 ? launcher.run_all<T, 128>()
                               : launcher.run_all<T, 256>();
  });
}

} // namespace fastdllm::cuda
