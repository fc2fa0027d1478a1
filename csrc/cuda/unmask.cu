// unmask: confidence, candidate, selection and commit (core/params.h, UnmaskParams), in two kernels.
//
// score_rows, a block of kScoreThreads per row of logits l [logit_rows, vocab]:
//   candidate  x = argmax over v != mask_id of l_v (T = 0) or l_v / T + g_v (T > 0); ties: the lowest id
//   score      exp(l_x - max l) / sum_v exp(l_v - max l); NaN where the row is bad
//   A thread takes groups of four tokens (one Philox counter, one load of 16 or 8 bytes where the row is
//   aligned so), keeps max, sum and argmax in registers, and the block merges them once at the end.
//   Bytes: the logits once.
//
// commit_rows, a block of kCommitThreads per sequence: a thread ranks a position by counting those that go
// before it, commits it if the rule selects that rank (core/select.h), then the block looks for the EOS that
// finishes the row and thread 0 advances the state. Sequences without rows of logits are left alone.
//
// NaN: fmaxf skips it and comparisons refuse it, but expf passes it on to the sum, as inf - inf does +inf.
// No atomics: the bits depend on the row alone. Row offsets fit int32; element offsets are int64.
#include <cmath>

#include "core/gumbel.h"
#include "core/select.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kScoreThreads = 1024;
constexpr int kCommitThreads = 256;

struct Best {
  float value;    // what is maximised: the logit, noisy where T > 0
  float logit;    // without noise
  uint32_t token; // kNoToken where there is none
};

__device__ __forceinline__ Best shuffle_xor(const Best& x, int lanes) {
  return {__shfl_xor_sync(kAllLanes, x.value, lanes), __shfl_xor_sync(kAllLanes, x.logit, lanes),
          __shfl_xor_sync(kAllLanes, x.token, lanes)};
}

template <class T> struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Tokens first ... first + 3 of a row; -inf past its end.
template <class T>
__device__ __forceinline__ void load_four(const T* row, int64_t first, int64_t vocab, bool aligned,
                                          float (&out)[4]) {
  if (aligned && first + 4 <= vocab) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(row + first);
    for (int j = 0; j < 4; ++j)
      out[j] = to_float(four.x[j]);
    return;
  }
  for (int j = 0; j < 4; ++j)
    out[j] = first + j < vocab ? to_float(row[first + j]) : -INFINITY;
}

struct ScoreShared {
  float floats[kWarp];
  Best bests[kWarp];
};
struct CommitShared {
  int64_t x[kWarp];
};

template <class T> __global__ void __launch_bounds__(kScoreThreads) score_rows(UnmaskParams p) {
  auto& [shared_float, shared_best] = shared_memory<ScoreShared>();
  const int64_t r = blockIdx.x;
  const int64_t b = sequence_of(r, p.cu_rows, p.sequences);
  if (b < 0)
    return;
  const RowState& row = p.rows[b];
  const uint64_t seed = static_cast<uint64_t>(row.seed);
  const uint32_t position = static_cast<uint32_t>(p.positions[r]), step = static_cast<uint32_t>(row.step),
                 stream = static_cast<uint32_t>(row.stream);
  const float temperature = p.knobs[b].temperature;
  const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % alignof(Four<T>) == 0;

  float largest = -kLargest, sum = 0;
  Best best = {-INFINITY, -INFINITY, kNoToken};
  for (int64_t first = 4 * static_cast<int64_t>(threadIdx.x); first < p.vocab; first += 4 * kScoreThreads) {
    float l[4];
    load_four(logits, first, p.vocab, aligned, l);
    const float top = fmaxf(fmaxf(l[0], l[1]), fmaxf(l[2], l[3]));
    if (top > largest) {
      sum *= expf(largest - top);
      largest = top;
    }
    for (int j = 0; j < 4; ++j)
      sum += expf(l[j] - largest);
    float value[4] = {l[0], l[1], l[2], l[3]};
    if (temperature > 0) {
      const Philox4 words = philox4x32(seed, static_cast<uint32_t>(first / 4), position, step, stream);
      for (int j = 0; j < 4; ++j)
        value[j] = noisy_logit(l[j], temperature, gumbel<uint32_t>(static_cast<float>(words.x[j])));
    }
    for (int j = 0; j < 4; ++j)
      if (value[j] > best.value && first + j != p.mask_id)
        best = {value[j], l[j], static_cast<uint32_t>(first) + j};
  }

  const float row_largest =
      block_reduce(largest, -kLargest, [](float x, float y) { return fmaxf(x, y); }, shared_float);
  sum *= expf(largest - row_largest);
  sum = block_reduce(sum, 0.0f, [](float x, float y) { return x + y; }, shared_float);
  best = block_reduce(
      best, Best{-INFINITY, -INFINITY, kNoToken},
      [](const Best& x, const Best& y) {
        return y.value > x.value || (y.value == x.value && y.token < x.token) ? y : x;
      },
      shared_best);
  if (threadIdx.x != 0)
    return;
  p.candidate[r] = static_cast<int32_t>(best.token);
  if (!(sum < INFINITY) || !(row_largest < INFINITY) || best.token == kNoToken) {
    p.score[r] = NAN;
  } else if (static_cast<Score>(row.score) == Score::kRandom) {
    const Philox4 words = philox4x32(seed, kNoToken, position, step, stream);
    p.score[r] = uniform(static_cast<float>(words.x[0]));
  } else {
    p.score[r] = expf(best.logit - row_largest) / sum;
  }
}

__device__ __forceinline__ bool is_eos(int64_t token, const int64_t* eos_ids, int64_t eos_count) {
  for (int64_t i = 0; i < eos_count; ++i)
    if (eos_ids[i] == token)
      return true;
  return false;
}

__global__ void __launch_bounds__(kCommitThreads, 4) commit_rows(UnmaskParams p) {
  auto& shared = shared_memory<CommitShared>().x;
  const int64_t b = blockIdx.x, first_row = p.cu_rows[b], count = p.cu_rows[b + 1] - first_row;
  if (count <= 0)
    return;
  const auto add = [](int64_t x, int64_t y) { return x + y; };
  const RowState before = p.rows[b]; // read by all threads ahead of the first barrier, written behind it
  const float value = p.knobs[b].value;
  const float* score = p.score + first_row;
  int64_t* tokens = p.tokens + b * p.width;

  int64_t bad = 0;
  for (int64_t i = threadIdx.x; i < count; i += kCommitThreads)
    bad += score[i] != score[i];
  bad = block_reduce(bad, int64_t{0}, add, shared);
  if (bad > 0) {
    if (threadIdx.x == 0)
      p.rows[b].bad_logits = bad;
    return;
  }

  int64_t committed = 0;
  for (int64_t i = threadIdx.x; i < count; i += kCommitThreads) {
    const float c = score[i];
    int64_t rank = 0;
    for (int64_t j = 0; j < count; ++j)
      rank += goes_before(score[j], j, c, i);
    if (!is_selected(before, value, rank, c))
      continue;
    const int64_t position = p.positions[first_row + i], at = b * p.width + position;
    tokens[position] = p.candidate[first_row + i];
    p.step_map[at] = static_cast<int32_t>(before.step);
    p.confidence[at] = c;
    ++committed;
  }
  committed = block_reduce(committed, int64_t{0}, add, shared); // its barriers also publish the tokens

  int64_t stop = before.end; // the first position with a mask or an end of sequence
  for (int64_t i = before.first + threadIdx.x; i < before.end; i += kCommitThreads)
    if (tokens[i] == p.mask_id || is_eos(tokens[i], p.eos_ids, p.eos_count)) {
      stop = i;
      break;
    }
  stop = block_reduce(stop, before.end, [](int64_t x, int64_t y) { return x < y ? x : y; }, shared);
  if (threadIdx.x != 0)
    return;
  RowState& row = p.rows[b];
  row.step = before.step + 1;
  row.block_step = before.block_step + 1;
  row.masks_left = before.masks_left - committed;
  row.eos_at = stop < before.end && tokens[stop] != p.mask_id ? stop : -1;
  row.bad_logits = 0;
}

template <class T> const char* unmask_all(const UnmaskParams& p, cudaStream_t stream) {
  if (const char* error = launch(score_rows<T>, dim3(static_cast<unsigned>(p.logit_rows)), kScoreThreads,
                                 sizeof(ScoreShared), stream, p))
    return error;
  return launch(commit_rows, dim3(static_cast<unsigned>(p.sequences)), kCommitThreads, sizeof(CommitShared),
                stream, p);
}

} // namespace

const char* unmask(const UnmaskParams& p, void* stream) {
  if (p.logit_rows == 0 || p.sequences == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) { return unmask_all<decltype(element)>(p, on); });
}

} // namespace fastdllm::cuda
