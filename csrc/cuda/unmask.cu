// unmask: confidence, candidate, selection and commit (core/params.h, UnmaskParams), in one kernel; where a
// row may have top-p or top-k, another one finds the rows' floors first.
//
// unmask_parts: a row of logits l [logit_rows, vocab] is split into parts of kPart tokens, a block each.
//   candidate  x = argmax over v != mask_id of l_v (T = 0) or l_v / T + g_v (T > 0); ties: the lowest id
//   score      with z = l / softmax_temperature, w_v = exp(z_v - max z), s = sum_v w_v (mask_id included):
//                probability w_x / s, margin (w_1st - w_2nd) / s (mask_id excluded),
//                entropy sum_v w_v (z_v - max z) / s - log s = sum p log p;
//              NaN where the row holds NaN or +inf, or no finite candidate
//   Tokens below the row's floor, where it has one, count as -inf.
//   The blocks of a row whose position holds no mask read none of it; they only arrive.
//   A thread loads kPerThread tokens at once, vectors of 16 bytes where the row is aligned so, and holds them
//   in registers for all passes but that of the noise. A warp's tokens become one Partial, the block merges
//   its warps', and writes it. The block that arrives last at its sequence merges the parts of each row
//   (kGroup lanes a row), adds the mask's logit, which the parts leave out, ranks the positions by counting
//   those that go before (core/select.h), commits, looks for the EOS that finishes the row and advances the
//   state. Nobody waits. Bytes: the logits of masks once, and 24 for each part twice. Sequences without masks
//   among their rows are left alone.
//
// find_floors: a block per row looks for the floor bit by bit, from the sum and number of the logits that
// reach a trial floor. Bytes: the logits once per bit of the dtype and twice more, from the L2 cache.
//
// NaN: fmaxf skips it and comparisons refuse it, but 2^x passes it on to the sum, as inf - inf does +inf.
// The parts depend on vocab alone and all orders of summation are fixed, so the bits depend on the row alone.
// Row offsets fit int32; element offsets are int64.
#include <cmath>

#include "core/gumbel.h"
#include "core/select.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/ptx.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerThread = 32;
constexpr int kPart = kThreads * kPerThread;
constexpr int kGroup = 8; // lanes that merge the parts of a row
constexpr int kRowsAtOnce = kThreads / kGroup;
constexpr int kFloorThreads = 512;
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLog2 = 0x1.62e43p-1f;

// What is known of some tokens of a row. With top = max(largest, -kLargest), u_v = (l_v - top) scale.
struct Partial {
  float largest = -INFINITY, second = -INFINITY;
  float sum = 0;           // of 2^u
  float moment = 0;        // of 2^u u
  float value = -INFINITY; // of the candidate: what it maximises
  uint32_t token = kNoToken;
};
constexpr int kPartialFloats = sizeof(Partial) / sizeof(float);

__device__ __forceinline__ Partial shuffle_xor(const Partial& x, int lanes) {
  Partial y;
  y.largest = __shfl_xor_sync(kAllLanes, x.largest, lanes);
  y.second = __shfl_xor_sync(kAllLanes, x.second, lanes);
  y.sum = __shfl_xor_sync(kAllLanes, x.sum, lanes);
  y.moment = __shfl_xor_sync(kAllLanes, x.moment, lanes);
  y.value = __shfl_xor_sync(kAllLanes, x.value, lanes);
  y.token = __shfl_xor_sync(kAllLanes, x.token, lanes);
  return y;
}

// From where exponents count: -inf - reference is -inf.
__device__ __forceinline__ float reference_of(float largest) { return fmaxf(largest, -kLargest); }

struct Merge {
  float scale;
  __device__ __forceinline__ Partial operator()(const Partial& a, const Partial& b) const {
    Partial r;
    r.largest = fmaxf(a.largest, b.largest);
    r.second = fmaxf(fminf(a.largest, b.largest), fmaxf(a.second, b.second));
    const float top = reference_of(r.largest);
    add(a, top, r);
    add(b, top, r);
    const bool better = b.value > a.value || (b.value == a.value && b.token < a.token);
    r.value = better ? b.value : a.value;
    r.token = better ? b.token : a.token;
    return r;
  }
  __device__ __forceinline__ void add(const Partial& x, float top, Partial& r) const {
    const float u = (x.largest - top) * scale, factor = exp2_approx(u);
    r.sum += factor * x.sum;
    r.moment += factor > 0 ? factor * (x.moment + x.sum * u) : 0.0f;
  }
};

// ---------------------------------------------------------------------------------------------------------
// A block's part of a row
// ---------------------------------------------------------------------------------------------------------

struct Stream {
  uint64_t seed;
  uint32_t position, step, stream;
  __device__ __forceinline__ Philox4 operator()(uint32_t counter) const {
    return philox4x32(seed, counter, position, step, stream);
  }
};

__device__ __forceinline__ Stream stream_of(const RowState& row, int64_t position) {
  return {static_cast<uint64_t>(row.seed), static_cast<uint32_t>(position), static_cast<uint32_t>(row.step),
          static_cast<uint32_t>(row.stream)};
}

// A Vector<T> as it comes from memory: nothing waits for it before its logits are asked for.
using Raw = Vector<uint32_t>;
template <class T> __device__ __forceinline__ float logit(const Raw& raw, int j) {
  if constexpr (sizeof(T) == sizeof(uint32_t))
    return __uint_as_float(raw.x[j]);
  else
    return to_float(T{static_cast<uint16_t>(raw.x[j / 2] >> j % 2 * 16)});
}

// What a thread has of a row: vectors first, first + kThreads, ..., kCount of them.
template <class T> struct ThreadTokens {
  static constexpr int kCount = kPerThread / kVector<T>;
  const T* row;
  int64_t first, whole, vocab; // the row's first `whole` vectors can be loaded as such

  // Vector i; -inf past the end of the row.
  __device__ __forceinline__ Raw load(int i) const {
    const int64_t index = first + i * kThreads;
    if (index < whole)
      return reinterpret_cast<const Raw*>(row)[index];
    Vector<T> v;
    for (int j = 0; j < kVector<T>; ++j) {
      const int64_t token = index * kVector<T> + j;
      v.x[j] = token < vocab ? row[token] : from_float<T>(-INFINITY);
    }
    return same_bits<Raw>(v);
  }
  // The token that logit i of the thread belongs to; it ascends with i.
  __device__ __forceinline__ uint32_t token(int i) const {
    return static_cast<uint32_t>(first * kVector<T>) +
           i / kVector<T> * (kThreads * kVector<T>)+i % kVector<T>;
  }
};

// The second largest of a warp's logits, which is the largest where that occurs twice.
__device__ __forceinline__ float warp_second(const float (&l)[kPerThread]) {
  float first = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = kPerThread - 1; i >= 0; --i) { // upwards, the compiler would keep the maxima of another loop
    second = fmaxf(second, fminf(l[i], first));
    first = fmaxf(first, l[i]);
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, first, lanes);
    second = fmaxf(fminf(first, other), fmaxf(second, __shfl_xor_sync(kAllLanes, second, lanes)));
    first = fmaxf(first, other);
  }
  return second;
}

// Raises `value` to the best noisy logit of the thread, and tells its token. It loads the logits again: so
// the noise, which takes most of the time, has the registers to itself.
template <class T>
__device__ __forceinline__ uint32_t best_noisy(const ThreadTokens<T>& tokens, int64_t mask_id, float floor,
                                               float temperature, const Stream& stream, float& value) {
  uint32_t best = kNoToken;
#pragma unroll 1
  for (int i = 0; i < kPerThread; i += kVector<T>) {
    const Raw raw = tokens.load(i / kVector<T>);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const uint32_t token = tokens.token(i + j);
      const Philox4 words = stream(token / 4); // once for four tokens
      const float noise = gumbel<uint32_t>(static_cast<float>(words.x[j % 4]));
      const float noisy = noisy_logit(logit<T>(raw, j), temperature, noise);
      if (noisy > value && token != mask_id && logit<T>(raw, j) >= floor) {
        value = noisy;
        best = token;
      }
    }
  }
  return best;
}

// Writes the Partial of part `part` of row r. `warps` is shared memory.
template <class T>
__device__ __forceinline__ void score_part(const UnmaskParams& p, int64_t b, int64_t r, int64_t part,
                                           Partial (&warps)[kWarps]) {
  const T* row = static_cast<const T*>(p.logits) + r * p.logits_stride;
  const bool is_aligned = reinterpret_cast<uintptr_t>(row) % sizeof(Vector<T>) == 0;
  const ThreadTokens<T> tokens{row, part * (kPart / kVector<T>)+threadIdx.x,
                               is_aligned ? p.vocab / kVector<T> : 0, p.vocab};
  Raw raw[tokens.kCount];
#pragma unroll
  for (int i = 0; i < tokens.kCount; ++i) // all on their way before anything else is asked for
    raw[i] = tokens.load(i);

  const Score score = static_cast<Score>(p.rows[b].score);
  const float temperature = p.knobs[b].temperature, scale = kLog2e / softmax_temperature(p.knobs[b]);
  const float floor = p.floor == nullptr ? -INFINITY : p.floor[r];
  float l[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    l[i] = logit<T>(raw[i / kVector<T>], i % kVector<T>);
  if (p.mask_id / kPart == part) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      l[i] = tokens.token(i) == p.mask_id ? -INFINITY : l[i];
  }
  if (p.floor != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      l[i] = l[i] < floor ? -INFINITY : l[i]; // a NaN stays
  }

  Partial x; // first of the warp, then of the block
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    largest = fmaxf(largest, l[i]);
  x.largest = warp_reduce(largest, Largest{});
  const float top = reference_of(x.largest);
  if (score == Score::kEntropy) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float u = (l[i] - top) * scale, w = exp2_approx(u);
      x.sum += w;
      x.moment += w > 0 ? w * u : 0.0f;
    }
    x.moment = warp_reduce(x.moment, Sum{});
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      x.sum += exp2_approx((l[i] - top) * scale);
  }
  x.sum = warp_reduce(x.sum, Sum{});
  if (score == Score::kMargin)
    x.second = warp_second(l);

  float value = largest; // the best of the thread
  if (temperature > 0) {
    value = -INFINITY;
    x.token = best_noisy(tokens, p.mask_id, floor, temperature, stream_of(p.rows[b], p.positions[r]), value);
    x.value = warp_reduce(value, Largest{});
  } else {
    x.value = x.largest;
    if (value == x.value) {
#pragma unroll
      for (int i = kPerThread - 1; i >= 0; --i)
        x.token = l[i] == value ? tokens.token(i) : x.token;
    }
  }
  x.token = warp_reduce(value == x.value ? x.token : kNoToken, Least{});

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0)
    warps[warp] = x;
  __syncthreads();
  if (warp != 0)
    return;
  x = warp_reduce(warps[lane % kWarps], Merge{scale}, kWarps);
  if (lane == 0)
    reinterpret_cast<Partial*>(p.partials)[blockIdx.x] = x;
}

// ---------------------------------------------------------------------------------------------------------
// The last block of a sequence
// ---------------------------------------------------------------------------------------------------------

struct Shared {
  Partial warps[kWarps];
  bool last;
  int64_t x[kWarp];
};

// The score of a row from its parts and the mask's logit, which is -inf where the mask is not kept.
template <class T>
__device__ __forceinline__ float row_score(const Partial& parts, float mask, const T* logits,
                                           const RowKnobs& knobs, Score score, const Stream& stream) {
  const Merge merge{kLog2e / softmax_temperature(knobs)};
  Partial mask_only;
  mask_only.largest = mask;
  mask_only.sum = 1;
  const Partial all = merge(parts, mask_only);
  if (all.sum != all.sum || parts.value == -INFINITY)
    return NAN;
  const auto weight = [&](float l) { return expf((l - all.largest) / softmax_temperature(knobs)); };
  switch (score) {
  case Score::kProbability:
    return weight(knobs.temperature > 0 ? to_float(logits[parts.token]) : parts.value) / all.sum;
  case Score::kRandom:
    return uniform(static_cast<float>(stream(kNoToken).x[0]));
  case Score::kMargin:
    return (weight(parts.largest) - weight(parts.second)) / all.sum;
  case Score::kEntropy:
    return fminf(all.moment / all.sum * kLog2 - logf(all.sum), 0.0f);
  }
  return NAN;
}

// Writes the candidate and the score of every row of the sequence; of one that is ignored a NaN score, so
// that it goes before no other.
template <class T>
__device__ __forceinline__ void score_rows(const UnmaskParams& p, int64_t b, int64_t parts) {
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup;
  const RowKnobs knobs = p.knobs[b];
  const Merge merge{kLog2e / softmax_temperature(knobs)};
  const Partial* partials = reinterpret_cast<const Partial*>(p.partials);
  const int64_t end = p.cu_rows[b + 1];
  for (int64_t base = p.cu_rows[b]; base < end; base += kRowsAtOnce) {
    const int64_t r = Least{}(base + group, end - 1); // the groups past the end repeat the last row
    const bool masked = is_masked(p, b, r);
    Partial x;
    for (int64_t part = lane; masked && part < parts; part += kGroup)
      x = merge(x, partials[r * parts + part]);
    x = warp_reduce(x, merge, kGroup);
    if (lane != 0)
      continue;
    if (!masked) {
      p.score[r] = NAN;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
    const float mask = p.mask_id < p.vocab ? to_float(logits[p.mask_id]) : -INFINITY;
    const bool dropped = p.floor != nullptr && mask < p.floor[r];
    p.candidate[r] = static_cast<int32_t>(x.token);
    p.score[r] = row_score(x, dropped ? -INFINITY : mask, logits, knobs, static_cast<Score>(p.rows[b].score),
                           stream_of(p.rows[b], p.positions[r]));
  }
}

__device__ __forceinline__ bool is_eos(int64_t token, const int64_t* eos_ids, int64_t eos_count) {
  for (int64_t i = 0; i < eos_count; ++i)
    if (eos_ids[i] == token)
      return true;
  return false;
}

// `noisy` has room for a key a row of the sequence, `shared` kWarp elements.
__device__ __forceinline__ void commit(const UnmaskParams& p, int64_t b, float* noisy, int64_t* shared) {
  const int64_t first_row = p.cu_rows[b], count = p.cu_rows[b + 1] - first_row;
  const RowState before = p.rows[b]; // read by all threads ahead of a barrier, written behind it
  const auto rule = static_cast<Rule>(before.rule);
  const float value = p.knobs[b].value;
  const int32_t most = quota(p, b);
  const float* score = p.score + first_row;
  int64_t* tokens = p.tokens + b * p.width;

  const bool has_noise = has_rank_noise(p.knobs[b]);
  const float* key = has_noise ? noisy : score;
  int64_t bad = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    bad += score[i] != score[i] && is_masked(p, b, first_row + i);
    if (has_noise) // p.rows[b] again: `before` would take registers that are not there
      noisy[i] = rank_key(p.rows[b], p.knobs[b].rank_temperature, p.positions[first_row + i], score[i]);
  }
  bad = block_reduce(bad, int64_t{0}, Sum{}, shared); // its barriers also publish the keys
  if (bad > 0) {
    if (threadIdx.x == 0)
      p.rows[b].bad_logits = bad;
    return;
  }

  int64_t committed = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (!is_masked(p, b, first_row + i))
      continue;
    const float c = score[i], k = key[i];
    int64_t rank = 0, costs = 0;
    for (int64_t j = 0; j < count; ++j)
      rank += goes_before(key[j], j, k, i);
    if (has_cost(rule))
      for (int64_t j = 0; j < count; ++j)
        costs += goes_before(key[j], j, k, i) ? cost(rule, score[j]) : 0;
    if (!is_selected(rule, value, most, rank, costs, c))
      continue;
    const int64_t position = p.positions[first_row + i], at = b * p.width + position;
    tokens[position] = p.candidate[first_row + i];
    p.step_map[at] = static_cast<int32_t>(before.step);
    p.confidence[at] = c;
    ++committed;
  }
  committed = block_reduce(committed, int64_t{0}, Sum{}, shared); // its barriers also publish the tokens
  if (committed == 0) // no mask: of one or more, the first by rank is always committed
    return;

  int64_t stop = before.end; // the first position with a mask or an end of sequence
#pragma unroll 4
  for (int64_t i = before.first + threadIdx.x; i < before.end; i += kThreads) {
    const int64_t token = tokens[i];
    if (token == p.mask_id || is_eos(token, p.eos_ids, p.eos_count))
      stop = Least{}(stop, i);
  }
  stop = block_reduce(stop, before.end, Least{}, shared);
  if (threadIdx.x != 0)
    return;
  RowState& row = p.rows[b];
  row.step = before.step + 1;
  row.block_step = before.block_step + 1;
  row.masks_left = before.masks_left - committed;
  row.eos_at = stop < before.end && tokens[stop] != p.mask_id ? stop : -1;
  row.bad_logits = 0;
}

template <class T> __global__ void __launch_bounds__(kThreads, 4) unmask_parts(UnmaskParams p) {
  auto& shared = shared_memory<Shared>();
  const int64_t parts = (p.vocab + kPart - 1) / kPart;
  const int64_t r = blockIdx.x / static_cast<unsigned>(parts), part = blockIdx.x - r * parts;
  const int64_t b = sequence_of(r, p.cu_rows, p.sequences);
  if (b < 0)
    return;
  if (is_masked(p, b, r)) // the same for the whole block: commits change no token of a row that is ignored
    score_part<T>(p, b, r, part, shared.warps);
  if (threadIdx.x == 0) {
    __threadfence(); // the partial is there before the arrival, here and for the block that sees it
    auto* arrivals = reinterpret_cast<unsigned long long*>(&p.rows[b].arrivals);
    const int64_t all = (p.cu_rows[b + 1] - p.cu_rows[b]) * parts;
    shared.last = static_cast<int64_t>(atomicAdd(arrivals, 1ull)) == all - 1;
    __threadfence();
    if (shared.last)
      *arrivals = 0;
  }
  __syncthreads();
  if (!shared.last)
    return;
  score_rows<T>(p, b, parts);
  __syncthreads();
  // Nobody needs the sequence's parts any more.
  commit(p, b, p.partials + p.cu_rows[b] * parts * kPartialFloats, shared.x);
}

// ---------------------------------------------------------------------------------------------------------
// Top-p and top-k
// ---------------------------------------------------------------------------------------------------------

struct Above {
  float sum; // of 2^u
  int count;
};
__device__ __forceinline__ Above shuffle_xor(const Above& x, int lanes) {
  return {__shfl_xor_sync(kAllLanes, x.sum, lanes), __shfl_xor_sync(kAllLanes, x.count, lanes)};
}
struct FloorShared {
  float floats[kWarp];
  Above above[kWarp];
};

// Images of floats, which sort as these do: 0 at the bottom, NaN at both ends. The values of a narrower dtype
// differ in fewer bits.
template <class T> constexpr int kImageBits = 32;
template <> constexpr int kImageBits<BFloat16> = 16;
template <> constexpr int kImageBits<Float16> = 19;
constexpr uint32_t kSign = 0x80000000u;
__device__ __forceinline__ float from_image(uint32_t image) {
  return __uint_as_float(image & kSign ? image ^ kSign : ~image);
}

// The floor is at least a trial value if the logits that reach that value are too many. So the image of the
// floor is built bit by bit, from the highest: a bit stays if the floor is at least the value with it. A
// trial value that is NaN is reached by none.
template <class T> __global__ void __launch_bounds__(kFloorThreads) find_floors(UnmaskParams p) {
  auto& shared = shared_memory<FloorShared>();
  const int64_t r = blockIdx.x;
  const int64_t b = sequence_of(r, p.cu_rows, p.sequences);
  if (b < 0 || !is_masked(p, b, r))
    return;
  const RowKnobs knobs = p.knobs[b];
  if (!has_top_p(knobs) && !has_top_k(knobs)) {
    if (threadIdx.x == 0)
      p.floor[r] = -INFINITY;
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  const float scale = kLog2e / softmax_temperature(knobs);

  float best = -INFINITY; // of the candidates
  for (int64_t i = threadIdx.x; i < p.vocab; i += kFloorThreads)
    if (i != p.mask_id)
      best = fmaxf(best, to_float(logits[i]));
  best = block_reduce(best, -INFINITY, Largest{}, shared.floats);
  const float mask = p.mask_id < p.vocab ? to_float(logits[p.mask_id]) : -INFINITY;
  const float top = reference_of(fmaxf(best, mask));

  const auto above = [&](float trial) {
    Above x{0, 0};
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < p.vocab; i += kFloorThreads) {
      const float l = to_float(logits[i]);
      if (l >= trial) {
        x.sum += exp2_approx((l - top) * scale);
        ++x.count;
      }
    }
    return block_reduce(
        x, Above{0, 0},
        [](const Above& s, const Above& t) { return Above{s.sum + t.sum, s.count + t.count}; }, shared.above);
  };
  const float most = has_top_p(knobs) ? knobs.top_p * above(-INFINITY).sum : INFINITY;
  const float count = has_top_k(knobs) ? knobs.top_k : INFINITY;
  uint32_t image = 0;
  for (int bit = 31; bit >= 32 - kImageBits<T>; --bit) {
    const uint32_t trial = image | 1u << bit;
    const Above x = above(from_image(trial));
    if (x.sum > most || static_cast<float>(x.count) >= count)
      image = trial;
  }
  if (threadIdx.x == 0)
    p.floor[r] = image == 0 ? -INFINITY : fminf(from_image(image), best);
}

// ---------------------------------------------------------------------------------------------------------

template <class T> const char* unmask_all(const UnmaskParams& p, cudaStream_t stream) {
  if (p.floor != nullptr)
    if (const char* error = launch(find_floors<T>, dim3(grid_size(p.logit_rows)), kFloorThreads,
                                   sizeof(FloorShared), stream, p))
      return error;
  const int64_t parts = (p.vocab + kPart - 1) / kPart;
  return launch(unmask_parts<T>, dim3(grid_size(p.logit_rows * parts)), kThreads, sizeof(Shared), stream, p);
}

} // namespace

int64_t unmask_partials(const UnmaskParams& p) {
  return p.logit_rows * ((p.vocab + kPart - 1) / kPart) * kPartialFloats;
}

const char* unmask(const UnmaskParams& p, void* stream) {
  if (p.logit_rows == 0 || p.sequences == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) { return unmask_all<decltype(element)>(p, on); });
}

} // namespace fastdllm::cuda
