// score_logits: the first half of unmask. For every row of logits l, in one pass over the vocabulary:
//   candidate  x = argmax over v != mask_id of l_v (T = 0) or l_v / T + g_v (T > 0); ties: the lowest id
//   score      with z = l / softmax_temperature, w_v = exp(z_v - max z), s = sum_v w_v (mask_id included):
//                probability w_x / s, margin (w_1st - w_2nd) / s (mask_id excluded),
//                entropy sum_v w_v (z_v - max z) / s - log s = sum p log p;
//              NaN where the row holds NaN or +inf, or no finite candidate; and where its position holds no
//              mask: such a row is not read
//   Tokens below the row's floor, where it has one, count as -inf.
//
//   logits     [logit_rows, vocab], rows logits_stride apart, any alignment; float32, bfloat16, float16
//   floor      [logit_rows] or none
//   candidate, score  [logit_rows]
//
// Bytes: the logits once. A work item is a row. A row goes by in chunks that stay in the first-level cache
// for their passes (max; sum of exponentials; what else the row asks for), while the chunk two further on is
// fetched. The sum is kept relative to the largest logit so far, in float32 within a chunk and in double
// across chunks.
//
// NaN: max() skips it and comparisons refuse it, but exp2() passes it on to the sum, as inf - inf does +inf.
// The mask's own logit starts the sum, and the chunk that holds it is copied with -inf in its place; so is
// the last chunk, filled up with -inf to whole vectors, and every chunk of a row with a floor.
#include "core/gumbel.h"
#include "core/select.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr int kChunk = 1024;
constexpr int kStep = 4 * kLanes; // what the loops take at a time
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 0x1.fffffep+127f;
constexpr float kLog2e = 0x1.715476p+0f;
constexpr double kLog2 = 0x1.62e42fefa39efp-1;

struct Float16 {
  uint16_t bits;
};

// Rebiases the exponent by a multiplication, which turns denormals into normal numbers as well.
inline F32 load(const Float16* p) {
  U16 r;
  __builtin_memcpy(&r, p, sizeof r);
  const U32 h = __builtin_convertvector(r, U32);
  const F32 magnitude = (F32)((h & 0x7fffu) << 13) * 0x1p112f;
  const U32 special = (U32)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (F32)((U32)magnitude | special | ((h & 0x8000u) << 16));
}

inline float to_float(Float16 x) {
  Float16 lanes[kLanes] = {x};
  return load(lanes)[0];
}

inline void minus_infinity(float& x) { x = -kInfinity; }
inline void minus_infinity(BFloat16& x) { x.bits = 0xff80; }
inline void minus_infinity(Float16& x) { x.bits = 0xfc00; }

// ---------------------------------------------------------------------------------------------------------
// Chunks. n is a multiple of kStep.
// ---------------------------------------------------------------------------------------------------------

template <class T> float chunk_max(const T* x, int n) {
  F32 m[4];
  for (int j = 0; j < 4; ++j)
    m[j] = broadcast(-kInfinity);
  // As an integer: the address may lie behind the logits.
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(x + n) + kChunk * sizeof(T);
  for (int i = 0; i < n; i += kStep) {
    for (unsigned line = 0; line < kStep * sizeof(T); line += 64)
      prefetch(reinterpret_cast<const void*>(ahead + i * sizeof(T) + line));
    for (int j = 0; j < 4; ++j)
      m[j] = max(load(x + i + j * kLanes), m[j]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// 2^x for x <= 0, to a relative error of 2e-7; zero below 2^-126 (denormals are slow), a NaN stays one.
inline F32 exp2_nonpositive(F32 x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  // 2^(x - floor x) by a polynomial with p(0) = 1, minimax in the relative error; scalef takes floor x
  // itself.
  const F32 f = (F32)_mm512_maskz_reduce_ps(kAllLanes, (__m512)x, _MM_FROUND_TO_NEG_INF);
  F32 p = fma(f, broadcast(0x1.e974fcp-10f), broadcast(0x1.277854p-7f));
  p = fma(f, p, broadcast(0x1.c91ce6p-5f));
  p = fma(f, p, broadcast(0x1.ebdb56p-3f));
  p = fma(f, p, broadcast(0x1.62e4bap-1f));
  p = fma(f, p, broadcast(1.0f));
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ); // true for NaN
  return (F32)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)x);
#else
  return exp2<5>(x);
#endif
}

// sum of 2^((x - reference) scale)
template <class T> float chunk_sum(const T* x, int n, float reference, float scale) {
  F32 s[4] = {};
  for (int i = 0; i < n; i += kStep)
    for (int j = 0; j < 4; ++j)
      s[j] += exp2_nonpositive((load(x + i + j * kLanes) - reference) * scale);
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// sum of 2^u u with u = (x - reference) scale; 0 where u = -inf
template <class T> float chunk_moment(const T* x, int n, float reference, float scale) {
  F32 s = {};
  for (int i = 0; i < n; i += kLanes) {
    const F32 u = (load(x + i) - reference) * scale, w = exp2_nonpositive(u);
    s += select(w > 0.0f, w * u, F32{});
  }
  return reduce_add(s);
}

// The two largest values, which are the same one where it occurs twice.
struct Top {
  float first = -kInfinity, second = -kInfinity;
  void add(float x) {
    const float lower = x < first ? x : first;
    first = x > first ? x : first;
    second = lower > second ? lower : second;
  }
};

template <class T> void chunk_top(const T* x, int n, Top& top) {
  F32 first = broadcast(-kInfinity), second = first;
  for (int i = 0; i < n; i += kLanes) {
    const F32 l = load(x + i);
    second = max(select(l < first, l, first), second);
    first = max(l, first);
  }
  for (int i = 0; i < kLanes; ++i) {
    top.add(first[i]);
    top.add(second[i]);
  }
}

// What lies below the floor becomes -inf; a NaN stays.
template <class T> void chunk_floor(T* x, int n, float floor) {
  for (int i = 0; i < n; ++i)
    if (to_float(x[i]) < floor)
      minus_infinity(x[i]);
}

// ---------------------------------------------------------------------------------------------------------
// Noise
// ---------------------------------------------------------------------------------------------------------

constexpr int kPairs = kLanes / 2;
typedef uint64_t U64 __attribute__((vector_size(kPairs * sizeof(uint64_t))));

// The product of the low halves of each lane.
inline U64 multiply_low(U64 a, uint32_t b) {
  const U64 factor = U64{} + b;
#if defined(__AVX512F__)
  return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// Philox4x32-10 (core/philox.h), a counter a lane: the four words of counter i to out[4 i ...]. The upper
// half of a lane holds nothing of meaning until the end.
inline void philox(uint64_t key, U64 c0, uint32_t c1_, uint32_t c2_, uint32_t c3_, uint32_t* out) {
  U64 c1 = U64{} + c1_, c2 = U64{} + c2_, c3 = U64{} + c3_;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const U64 p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const U64 first = (c0 & 0xffffffffu) | (c1 << 32), second = (c2 & 0xffffffffu) | (c3 << 32);
#if defined(__AVX512F__)
  const U64 pairs[2] = {__builtin_shufflevector(first, second, 0, 8, 1, 9, 2, 10, 3, 11),
                        __builtin_shufflevector(first, second, 4, 12, 5, 13, 6, 14, 7, 15)};
#elif defined(__AVX2__)
  const U64 pairs[2] = {__builtin_shufflevector(first, second, 0, 4, 1, 5),
                        __builtin_shufflevector(first, second, 2, 6, 3, 7)};
#else
  const U64 pairs[2] = {__builtin_shufflevector(first, second, 0, 2),
                        __builtin_shufflevector(first, second, 1, 3)};
#endif
  __builtin_memcpy(out, pairs, sizeof pairs);
}

// The best noisy logit so far, a lane each; lanes advance together, so the lowest id of equals is the oldest.
struct Best {
  F32 value = broadcast(-kInfinity);
  I32 token = broadcast(int32_t{-1}); // none
};

struct Stream {
  uint64_t seed;
  uint32_t position, step, stream;
};

inline bool any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i)
    lanes |= mask[i];
  return lanes != 0;
#endif
}

// The largest word whose noise can lift a logit of at most `top` above the best value so far; -1 where none
// can. The rounding of values, noise and this bound is allowed for several times over.
int64_t last_useful_word(float top, float temperature, float best) {
  const double scaled = static_cast<double>(top) / temperature;
  const double slack = 1e-4 + 1e-6 * (__builtin_fabs(scaled) + __builtin_fabs(best));
  const double noise = best - scaled - slack;
  if (noise > kGumbelMax || top == -kInfinity)
    return -1;
  const double word = -__builtin_expm1(-__builtin_exp(-noise)) * 0x1p32; // noise(word) = noise
  return word < 0xfffffff0 ? static_cast<int64_t>(word) + 1 : 0xffffffff;
}

template <class T>
void chunk_noise(const T* x, int n, float top, int64_t first_token, const Stream& stream, float temperature,
                 Best& best) {
  const int64_t last_word = last_useful_word(top, temperature, reduce_max(best.value));
  if (last_word < 0)
    return;
  const U32 useful = broadcast(static_cast<uint32_t>(last_word));
  alignas(64) uint32_t words[kChunk];
  U64 counter;
  for (int i = 0; i < kPairs; ++i)
    counter[i] = static_cast<uint64_t>(first_token) / 4 + i;
  for (int i = 0; i < n; i += 4 * kPairs, counter += kPairs)
    philox(stream.seed, counter, stream.position, stream.step, stream.stream, words + i);
  const F32 t = broadcast(temperature);
  I32 token = iota() + static_cast<int32_t>(first_token);
  for (int i = 0; i < n; i += kLanes, token += kLanes) {
    U32 word;
    __builtin_memcpy(&word, words + i, sizeof word);
    if (!any((I32)(word <= useful)))
      continue;
    const F32 noise = gumbel<U32>(__builtin_convertvector(word, F32));
    const F32 value = noisy_logit(load(x + i), t, noise);
    const I32 better = value > best.value;
    best.value = select(better, value, best.value);
    best.token = select(better, token, best.token);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Rows
// ---------------------------------------------------------------------------------------------------------

struct Scored {
  int64_t token; // -1 with a NaN score
  float score;
};

template <class T>
Scored score_row(const T* logits, int64_t vocab, int64_t mask_id, float floor, const RowKnobs& knobs,
                 Score score, const Stream& stream) {
  const float temperature = knobs.temperature, scale = kLog2e / softmax_temperature(knobs);
  alignas(64) T copy[kChunk];
  double sum = 0, moment = 0; // of w and w log2 w
  float largest = -kLargest;  // a logit, or this where there is none above it
  const bool has_mask = mask_id >= 0 && mask_id < vocab;
  if (has_mask && to_float(logits[mask_id]) != -kInfinity && !(to_float(logits[mask_id]) < floor)) {
    largest = to_float(logits[mask_id]);
    sum = 1;
  }

  float best = -kInfinity; // of the candidates, without noise
  Top two;                 // likewise
  int64_t best_chunk = 0;
  Best noisy;
  for (int64_t start = 0; start < vocab; start += kChunk) {
    const T* x = logits + start;
    int n = static_cast<int>(vocab - start < kChunk ? vocab - start : kChunk);
    const bool masked = has_mask && mask_id >= start && mask_id < start + n;
    if (masked || n % kStep != 0 || floor > -kInfinity) {
      __builtin_memcpy(copy, x, n * sizeof(T));
      for (; n % kStep != 0; ++n)
        minus_infinity(copy[n]);
      if (masked)
        minus_infinity(copy[mask_id - start]);
      chunk_floor(copy, n, floor);
      x = copy;
    }
    const float top = chunk_max(x, n);
    if (top > best) {
      best = top;
      best_chunk = start;
    }
    if (top > largest) {
      const double step = (static_cast<double>(largest) - top) * scale, factor = __builtin_exp2(step);
      moment = factor > 0 ? factor * (moment + sum * step) : 0;
      sum *= factor;
      largest = top;
    }
    sum += chunk_sum(x, n, largest, scale);
    if (score == Score::kEntropy)
      moment += chunk_moment(x, n, largest, scale);
    if (score == Score::kMargin)
      chunk_top(x, n, two);
    if (temperature > 0)
      chunk_noise(x, n, top, start, stream, temperature, noisy);
  }
  if (!(sum < kInfinity) || !(largest < kInfinity) || best == -kInfinity)
    return {-1, __builtin_nanf("")};

  int64_t token = best_chunk;
  if (temperature > 0) {
    float value[kLanes];
    store(value, noisy.value);
    int lane = 0;
    for (int i = 1; i < kLanes; ++i)
      if (value[i] > value[lane] || (value[i] == value[lane] && noisy.token[i] < noisy.token[lane]))
        lane = i;
    token = noisy.token[lane];
    if (token < 0)
      return {-1, __builtin_nanf("")}; // every l / T is -inf
  } else {
    while (token == mask_id || to_float(logits[token]) != best)
      ++token;
  }
  const auto weight = [=](float l) { return __builtin_exp2((static_cast<double>(l) - largest) * scale); };
  double c = 0;
  switch (score) {
  case Score::kProbability:
    c = weight(to_float(logits[token])) / sum;
    break;
  case Score::kMargin:
    c = (weight(two.first) - weight(two.second)) / sum;
    break;
  case Score::kEntropy:
    c = moment / sum * kLog2 - __builtin_log(sum);
    c = c < 0 ? c : 0;
    break;
  case Score::kRandom:
    uint32_t words[4 * kPairs];
    philox(stream.seed, U64{} + kNoToken, stream.position, stream.step, stream.stream, words);
    c = uniform(static_cast<float>(words[0]));
    break;
  }
  return {token, static_cast<float>(c)};
}

template <class T> void score_rows(const UnmaskParams& p, int64_t begin, int64_t end) {
  int64_t b = 0;
  for (int64_t r = begin; r < end; ++r) {
    while (b < p.sequences && p.cu_rows[b + 1] <= r)
      ++b;
    if (b == p.sequences || p.cu_rows[b] > r)
      return;
    p.candidate[r] = -1;
    p.score[r] = __builtin_nanf("");
    if (!is_masked(p, b, r))
      continue;
    const RowState& row = p.rows[b];
    const Stream stream{static_cast<uint64_t>(row.seed), static_cast<uint32_t>(p.positions[r]),
                        static_cast<uint32_t>(row.step), static_cast<uint32_t>(row.stream)};
    const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
    const float floor = p.floor ? p.floor[r] : -kInfinity;
    const Scored scored =
        score_row(logits, p.vocab, p.mask_id, floor, p.knobs[b], static_cast<Score>(row.score), stream);
    p.candidate[r] = static_cast<int32_t>(scored.token);
    p.score[r] = scored.score;
  }
}

} // namespace

void score_logits(const UnmaskParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
  case Dtype::kFloat32:
    return score_rows<float>(p, begin, end);
  case Dtype::kBFloat16:
    return score_rows<BFloat16>(p, begin, end);
  case Dtype::kFloat16:
    return score_rows<Float16>(p, begin, end);
  }
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
