// The arithmetic of one block of paged_attention: scores, online softmax and sums over a tile of keys in
// shared memory. Two kinds with the same face: tensor cores for bfloat16 and float16, plain float arithmetic
// for float32. Scores are in units of log2, so that weights are powers of two. Where keys have scales, scores
// are multiplied with those of keys, and weights, once they are in the sum, with those of values.
#pragma once

#include "cuda/attention_pipeline.h"

namespace fastdllm::cuda {

// ---------------------------------------------------------------------------------------------------------
// Tensor cores. Four warps: kRowWarps over the rows, the others over the keys of a tile. A warp takes
// kRowTiles x 16 rows and keeps their sums in registers, in the layout of mma_m16n8k16's D. Warps of other
// keys have softmax states of their own, merged at the end.
// ---------------------------------------------------------------------------------------------------------

template <class T, int kDim_, int kRowWarps, int kRowTiles> struct TensorTile {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr int kKeyWarps = kAttentionThreads / kWarp / kRowWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kKeys = kDim * kRowTiles > 128 ? 32 : 64; // by the registers that sums leave to scores
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  // Q's fragments stay in registers where there is room for them.
  static constexpr bool kKeepsQ = kDim * kRowTiles <= 128;
  static_assert(kWarpKeys % 16 == 0 && kDim % 16 == 0 && kKeyWarps <= 2);

  struct Extra {};
  struct Merge { // of the second warps over the keys, in the place of the stages
    float o[kRows][kDim], largest[kRows], sum[kRows];
  };
  static constexpr size_t kMergeBytes = kKeyWarps > 1 ? sizeof(Merge) : 0;

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_row = warp % kRowWarps * 16 * kRowTiles, first_key = warp / kRowWarps * kWarpKeys;
  const SharedRow<T, kDim>* q_rows = nullptr;
  uint32_t q[kKeepsQ ? kRowTiles : 1][kKeepsQ ? kDim / 16 : 1][4];
  float o[kRowTiles][kDim / 8][4] = {};
  // Of rows lane / 4 and lane / 4 + 8. `sum` is over this lane's own columns until the end.
  float largest[kRowTiles][2], sum[kRowTiles][2] = {};

  __device__ TensorTile() {
    for (auto& rows : largest)
      rows[0] = rows[1] = -kLargest;
  }

  __device__ void load_q(uint32_t (&a)[4], int i, int kk) const {
    ldmatrix_x4(a, &q_rows[first_row + 16 * i + lane % 16].x[16 * kk + lane / 16 * 8]);
  }

  __device__ void begin(const SharedRow<T, kDim>* rows, Extra&) {
    q_rows = rows;
    if constexpr (kKeepsQ) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int kk = 0; kk < kDim / 16; ++kk)
          load_q(q[i][kk], i, kk);
    }
  }

  // `keys` of the tile are keys of the sequence.
  template <class Rows> __device__ void step(const Rows& stage, int keys, float scale, Extra&) {
    float s[kRowTiles][kWarpKeys / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < kDim / 16; ++kk) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (kKeepsQ) {
#pragma unroll
          for (int r = 0; r < 4; ++r)
            a[i][r] = q[i][kk][r];
        } else {
          load_q(a[i], i, kk);
        }
      }
#pragma unroll
      for (int j = 0; j < kWarpKeys / 16; ++j) { // 16 keys as two B fragments of 8
        uint32_t b[4];
        const int key = first_key + 16 * j + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b, &stage.k[key].x[16 * kk + lane / 8 % 2 * 8]);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<T>(s[i][2 * j], a[i], b[0], b[1]);
          mma_m16n8k16<T>(s[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      float top[2] = {largest[i][0], largest[i][1]};
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key + 8 * n + lane % 4 * 2 + e % 2;
          float factor = scale;
          if constexpr (Rows::kScaled)
            factor *= stage.k_scales[key];
          s[i][n][e] = key < keys ? s[i][n][e] * factor : -INFINITY;
          top[e / 2] = fmaxf(top[e / 2], s[i][n][e]);
        }
      float shrink[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = warp_reduce(top[h], Largest{}, 4);
        shrink[h] = exp2_approx(largest[i][h] - top[h]);
        largest[i][h] = top[h];
        sum[i][h] *= shrink[h];
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          o[i][n][e] *= shrink[e / 2];
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[i][n][e] = exp2_approx(s[i][n][e] - top[e / 2]);
          sum[i][e / 2] += s[i][n][e];
          if constexpr (Rows::kScaled)
            s[i][n][e] *= stage.v_scales[first_key + 8 * n + lane % 4 * 2 + e % 2];
        }
    }

#pragma unroll
    for (int j = 0; j < kWarpKeys / 16; ++j) {
      uint32_t a[kRowTiles][4]; // two D fragments of scores are one A fragment of weights
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          a[i][r] = pack_two<T>(s[i][2 * j + r / 2][r % 2 * 2], s[i][2 * j + r / 2][r % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, &stage.v[first_key + 16 * j + lane % 16].x[16 * n + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<T>(o[i][2 * n], a[i], b[0], b[1]);
          mma_m16n8k16<T>(o[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // writer(row, largest, sum) for the tile's rows, of which there are `rows`.
  template <class Writer> __device__ void finish(int rows, int head_dim, void* stages, const Writer& writer) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        sum[i][h] = warp_reduce(sum[i][h], Sum{}, 4);
    if constexpr (kKeyWarps > 1) {
      Merge& merge = *static_cast<Merge*>(stages);
      __syncthreads(); // all are done with the stages
      if (first_key > 0)
        hand_over(merge);
      __syncthreads();
      if (first_key > 0)
        return;
      take_over(merge);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + 16 * i + 8 * h + lane / 4;
        if (row >= rows)
          continue;
        const auto out = writer(row, largest[i][h], sum[i][h]);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
          if (8 * n < head_dim)
            out.put_two(8 * n + lane % 4 * 2, o[i][n][2 * h], o[i][n][2 * h + 1]);
      }
  }

  __device__ void hand_over(Merge& merge) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + 16 * i + 8 * h + lane / 4;
        merge.largest[row] = largest[i][h]; // four lanes, the same value
        merge.sum[row] = sum[i][h];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
          *reinterpret_cast<Pack<float, 2>*>(&merge.o[row][8 * n + lane % 4 * 2]) = {o[i][n][2 * h],
                                                                                     o[i][n][2 * h + 1]};
      }
  }

  __device__ void take_over(const Merge& merge) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + 16 * i + 8 * h + lane / 4;
        const float top = fmaxf(largest[i][h], merge.largest[row]);
        const float mine = exp2_approx(largest[i][h] - top), theirs = exp2_approx(merge.largest[row] - top);
        largest[i][h] = top;
        sum[i][h] = mine * sum[i][h] + theirs * merge.sum[row];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const auto other = *reinterpret_cast<const Pack<float, 2>*>(&merge.o[row][8 * n + lane % 4 * 2]);
          o[i][n][2 * h] = mine * o[i][n][2 * h] + theirs * other.x[0];
          o[i][n][2 * h + 1] = mine * o[i][n][2 * h + 1] + theirs * other.x[1];
        }
      }
  }
};

// ---------------------------------------------------------------------------------------------------------
// float32. A warp takes kWarpRows rows and all keys. Scores: a lane has one key, and kLaneRows of the rows;
// the weights go through shared memory. Sums: a lane has the columns lane, lane + 32, ... of all the warp's
// rows.
// ---------------------------------------------------------------------------------------------------------

template <int kDim_> struct FloatTile {
  using Element = float;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kAttentionThreads / kWarp;
  static constexpr int kWarpRows = kDim > 128 ? 4 : 8;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kDim > 128 ? 16 : 32;
  static constexpr int kLaneRows = kWarpRows * kKeys / kWarp;
  static constexpr int kColumns = kDim / kWarp;

  static constexpr size_t kMergeBytes = 0;
  struct alignas(16) Extra {
    float weights[kRows][kKeys], shrink[kRows], sum[kRows], largest[kRows];
  };

  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * kWarpRows;
  const int key = lane % kKeys, score_row = first_row + lane / kKeys * kLaneRows;
  const SharedRow<float, kDim>* q_rows = nullptr;
  Extra* extra_ = nullptr;
  float o[kWarpRows][kColumns] = {};
  float largest[kLaneRows], sum[kLaneRows] = {}; // of the score rows; `sum` over this lane's own keys

  __device__ FloatTile() {
    for (float& x : largest)
      x = -kLargest;
  }

  __device__ void begin(const SharedRow<float, kDim>* rows, Extra& extra) {
    q_rows = rows;
    extra_ = &extra;
  }

  template <class Rows> __device__ void step(const Rows& stage, int keys, float scale, Extra& extra) {
    if constexpr (Rows::kScaled)
      scale *= stage.k_scales[key];
    using Four = Pack<float, 4>;
    float s[kLaneRows] = {};
#pragma unroll 4
    for (int d = 0; d < kDim; d += 4) {
      const Four k = *reinterpret_cast<const Four*>(&stage.k[key].x[d]);
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const Four q = *reinterpret_cast<const Four*>(&q_rows[score_row + r].x[d]);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[r] += q.x[e] * k.x[e];
      }
    }
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      s[r] = key < keys ? s[r] * scale : -INFINITY;
      const float top = fmaxf(largest[r], warp_reduce(s[r], Largest{}, kKeys));
      const float shrink = exp2f(largest[r] - top), weight = exp2f(s[r] - top);
      largest[r] = top;
      sum[r] = sum[r] * shrink + weight;
      if constexpr (Rows::kScaled)
        extra.weights[score_row + r][key] = weight * stage.v_scales[key];
      else
        extra.weights[score_row + r][key] = weight;
      extra.shrink[score_row + r] = shrink; // kKeys lanes, the same value
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        o[r][c] *= extra.shrink[first_row + r];
#pragma unroll 2
    for (int j = 0; j < kKeys; j += 4) {
      Four weights[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r)
        weights[r] = *reinterpret_cast<const Four*>(&extra.weights[first_row + r][j]);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float v = stage.v[j + e].x[lane + c * kWarp];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r)
            o[r][c] += weights[r].x[e] * v;
        }
    }
  }

  template <class Writer> __device__ void finish(int rows, int head_dim, void*, const Writer& writer) {
    Extra& extra = *extra_;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      extra.sum[score_row + r] = warp_reduce(sum[r], Sum{}, kKeys); // kKeys lanes, the same value
      extra.largest[score_row + r] = largest[r];
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int row = first_row + r;
      if (row >= rows)
        return;
      const auto out = writer(row, extra.largest[row], extra.sum[row]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (lane + c * kWarp < head_dim)
          out.put(lane + c * kWarp, o[r][c]);
    }
  }
};

} // namespace fastdllm::cuda
