// What one block of paged_attention works on, and how its keys and values get into shared memory.
//
// A tile of rows is `kRows` query rows of one sequence and KV head: row r is query r / group, head r % group
// of the group, so that K and V are read once for all heads of a group. The keys of a tile of rows are split
// over blocks, evenly in tiles of `kKeys` keys; how many splits there are follows from the sequence alone
// (and from the device), so its bits do not depend on the batch. A block walks over its tiles of keys,
// `stages` of them in shared memory at a time.
#pragma once

#include "cuda/ptx.h"

namespace fastdllm::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kBlocksAtATime = 2; // of a multiprocessor
inline constexpr int kMaxSplits = kWarp; // a lane each when they are merged
inline constexpr int kLeastTiles = 2;    // of keys in a split
inline constexpr int kMaxStages = 3;

// What the host decides for a launch. Sequences with at most `above` or more than `upto` rows of a KV head
// are another launch's.
struct AttentionPlan {
  int above, upto;
  int group;              // query heads of a KV head
  int slots;              // blocks that the device runs at a time
  int tiles_per_sequence; // room for partial results, in tiles of rows
  int stages;
};

// ---------------------------------------------------------------------------------------------------------
// Work
// ---------------------------------------------------------------------------------------------------------

struct SequenceWork {
  int64_t first_token;
  int rows, row_tiles, kv_len;
  int tiles, splits, tiles_per_split; // of keys

  __device__ SequenceWork(const PagedAttentionParams& p, const AttentionPlan& plan, int64_t b, int row_count,
                          int key_count) {
    first_token = p.cu_seqlens_q[b];
    rows = (p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]) * plan.group;
    if (rows <= plan.above || rows > plan.upto)
      rows = 0;
    row_tiles = (rows + row_count - 1) / row_count;
    kv_len = p.kv_lens[b];
    tiles = (kv_len + key_count - 1) / key_count;
    // As many as fill the device, were the sequence alone.
    int wanted = rows > 0 ? plan.slots / (static_cast<int>(p.kv_heads) * row_tiles) : 0;
    wanted = Most{}(Least{}(wanted, Least{}(tiles / kLeastTiles, kMaxSplits)), 1);
    tiles_per_split = (tiles + wanted - 1) / wanted;
    splits = tiles > 0 ? (tiles + tiles_per_split - 1) / tiles_per_split : 1;
  }
};

// Where the partial results of a tile of rows begin in the scratch memory: splits in order, each row_count
// rows of head_dim sums, the largest score and the sum of weights.
__device__ __forceinline__ float* partial_rows(const PagedAttentionParams& p, const AttentionPlan& plan,
                                               const SequenceWork& work, int64_t b, int kv_head, int row_tile,
                                               int split, int row_count) {
  const int64_t tile =
      b * plan.tiles_per_sequence + (kv_head * work.row_tiles + row_tile) * work.splits + split;
  return p.scratch + tile * row_count * (p.head_dim + 2);
}

// The row of q or out, in elements.
__device__ __forceinline__ int64_t row_offset(const PagedAttentionParams& p, const AttentionPlan& plan,
                                              int64_t first_token, int kv_head, int row) {
  const int64_t token = first_token + row / plan.group;
  return (token * p.q_heads + kv_head * plan.group + row % plan.group) * p.head_dim;
}

// ---------------------------------------------------------------------------------------------------------
// Keys and values in shared memory
// ---------------------------------------------------------------------------------------------------------

// Rows are 16 bytes longer than they need to be: eight rows of a matrix then lie in different banks.
template <class T, int kDim> struct alignas(16) SharedRow {
  T x[kDim + kVector<T>];
};
template <class T, int kDim, int kKeys> struct Stage {
  static constexpr bool kScaled = false;
  SharedRow<T, kDim> k[kKeys], v[kKeys];
};

// Where the keys of a sequence and KV head lie, by pages that are looked up tile by tile.
class KeyPlaces {
public:
  // The pages from the tile's first on, a lane each. A step ahead of load(), whose addresses wait for them.
  __device__ void find_pages(int tile) {
    first_block_ = tile * tile_keys_ >> shift_;
    const int block = first_block_ + static_cast<int>(threadIdx.x % kWarp);
    page_ = block << shift_ < kv_len_ ? table_[block] : 0;
  }

protected:
  __device__ KeyPlaces(const PagedAttentionParams& p, int64_t b, int kv_head, int tile_keys)
      : table_(p.block_table + b * p.max_blocks), kv_head_(kv_head), kv_heads_(p.kv_heads),
        kv_len_(p.kv_lens[b]), tile_keys_(tile_keys), page_size_(static_cast<int>(p.page_size)),
        shift_(p.page_size == 16   ? 4
               : p.page_size == 32 ? 5
                                   : 6) {}

  // The row of [pages, kv_heads, page_size]. For whole warps.
  __device__ int64_t place_of(int key) const {
    const int page = __shfl_sync(kAllLanes, page_, (key >> shift_) - first_block_);
    return (page * kv_heads_ + kv_head_) * page_size_ + (key & (page_size_ - 1));
  }
  __device__ int kv_len() const { return kv_len_; }

private:
  const int32_t* table_;
  int64_t kv_head_, kv_heads_;
  int kv_len_, tile_keys_, page_size_, shift_;
  int first_block_ = 0, page_ = 0;
};

// Rows past the end of the sequence are zero, since weights of zero meet them in V.
template <class T, int kDim, int kKeys, bool kBulk> class KeyLoader : public KeyPlaces {
  static constexpr int kChunks = kDim / kVector<T>;
  static_assert(kKeys * kChunks % kAttentionThreads == 0 && kDim % kVector<T> == 0);

public:
  using Stage = cuda::Stage<T, kDim, kKeys>;
  struct Rows {}; // stages are used as they come
  static constexpr bool kIsBulk = kBulk, kWidens = false;

  __device__ KeyLoader(const PagedAttentionParams& p, int64_t b, int kv_head)
      : KeyPlaces(p, b, kv_head, kKeys), k_(static_cast<const T*>(p.k_pages)),
        v_(static_cast<const T*>(p.v_pages)), head_dim_(static_cast<int>(p.head_dim)) {}

  // Zeros behind head_dim, which no copy touches: K's are multiplied by Q's.
  __device__ void clear_padding(Stage* stages, int count) const {
    for (int i = threadIdx.x; i < count * kKeys; i += kAttentionThreads)
      for (int d = head_dim_; d < kDim; ++d)
        stages[i / kKeys].k[i % kKeys].x[d] = T{};
  }

  // Starts the copies of the tile that find_pages saw last. Bulk copies report to the barrier, whose only
  // arrival in this phase is here; it may come after some of the copies.
  __device__ void load(Stage& stage, int tile, uint64_t* barrier) const {
    const int first_key = tile * kKeys;
    if constexpr (kBulk) {
      const uint32_t row_bytes = static_cast<uint32_t>(head_dim_ * sizeof(T));
      if (threadIdx.x == 0)
        mbarrier_arrive_expect(barrier,
                               2 * row_bytes * static_cast<uint32_t>(Least{}(kv_len() - first_key, kKeys)));
      for (int i = threadIdx.x; i < 2 * kKeys; i += kAttentionThreads) {
        const bool is_k = i < kKeys;
        const int row = i % kKeys;
        const int64_t from = place_of(first_key + row) * head_dim_;
        SharedRow<T, kDim>& to = is_k ? stage.k[row] : stage.v[row];
        if (first_key + row < kv_len())
          bulk_copy(&to, (is_k ? k_ : v_) + from, row_bytes, barrier);
        else
          to = SharedRow<T, kDim>{};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kKeys * kChunks; i += kAttentionThreads) {
        const int row = (i + threadIdx.x) / kChunks, column = (i + threadIdx.x) % kChunks * kVector<T>;
        const int64_t from = place_of(first_key + row) * head_dim_ + column;
        const bool live = first_key + row < kv_len();
        if (column < head_dim_) {
          cp_async_16(&stage.k[row].x[column], k_ + from, live);
          cp_async_16(&stage.v[row].x[column], v_ + from, live);
        }
      }
    }
  }

private:
  const T *k_, *v_;
  int head_dim_;
};

// ---------------------------------------------------------------------------------------------------------
// Results
// ---------------------------------------------------------------------------------------------------------

// Takes a row of sums weights * V: into `out` divided by the sum of weights, or as it is into a partial
// result.
template <class T> class RowWriter {
public:
  __device__ RowWriter(T* out, float* partial, int head_dim, float largest, float sum)
      : out_(out), partial_(partial), factor_(1.0f / sum) {
    if (partial_) {
      partial_[head_dim] = largest; // every lane of the row writes the same
      partial_[head_dim + 1] = sum;
    }
  }
  __device__ void put(int d, float x) const {
    if (partial_)
      partial_[d] = x;
    else
      out_[d] = from_float<T>(x * factor_);
  }
  __device__ void put_two(int d, float x, float y) const { // d even
    if (partial_)
      *reinterpret_cast<Pack<float, 2>*>(partial_ + d) = {x, y};
    else
      *reinterpret_cast<uint32_t*>(out_ + d) = pack_two<T>(x * factor_, y * factor_);
  }

private:
  T* out_;
  float* partial_;
  float factor_;
};

} // namespace fastdllm::cuda
