// out[r, j] = sum_k x[r, k] weight[j, k] + bias[j];  gated: out[r, j] = silu(gate[r, j]) * up[r, j] of the
// two halves of the weight, for few rows r.
//
// x [rows, k], strided rows; weight [n, k] ([2 n, k]), strided rows; bias [n] ([2 n]); out [rows, n]. Sums in
// float32 in the order of k, whatever the rows; rounded after the bias is added. An int8 weight has a scale
// for each of its rows, which multiplies the sum.
//
// Bytes: the weight once, x once a thread, out once. What few rows cost is the reading of the weight, so that
// it is read as it lies and nothing of it is packed: x^T is, once a call and thread, which is small.
//
// Work: an item is linear_rows() rows of x and two bands of kLinearBandRows rows of the weight; gated, one of
// the gate's and one of the up's. Sums are [row of the weight][row of x]: rows of x lie in the lanes, in
// strips of two vectors, and the elements of kUnits rows of the weight are broadcast. They are turned when
// out is written. Where x does not fit in a core's own cache, a group of items goes over a part of k before
// the next.
//
// Element formats: as in paged_attention.cpp. bfloat16 is widened to float32 kUnits rows at a time, or read
// in pairs as it lies where there is vdpbf16ps; int8 is widened. With a tile unit bfloat16 and int8 have an
// inner loop of their own, linear_amx.h; without one but with vpdpbusd, int8 is multiplied by the bytes of x.
#include "cpu/linear.h"
#if defined(__AMX_INT8__)
#include "cpu/linear_amx.h"
#elif defined(__AVX512VNNI__)
#include "cpu/linear_int8.h"
#endif

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr int kStripRows = 2 * kLanes;
static_assert(kBandRows % kUnits == 0);

// Rows of the weight that are shorter are asked for ahead. The hardware itself follows along longer ones.
constexpr int64_t kPage = 4096; // bytes

// The formats of x and of the weight together, and how strips of x are packed.
template <class Pair> struct PackedRows {
  struct Strip {};                  // what is known of one
  static constexpr int kPlanes = 1; // of words, side by side, that a row of x has
  static void pack_strip(const LinearParams& p, int64_t first, int64_t width, int64_t words, Word* to,
                         Strip&) {
    pack_rows<Pair>(p, first, width, words, to);
  }
  static void combine(const Strip*, int64_t, float*) {}
};

template <class Format_> struct Same : Format_, PackedRows<Same<Format_>> {
  using Format = Format_;
  using Weight = typename Format::Element;
};

// int8 weights. x is widened to float32, the weight too.
template <class T> struct Widened : Float32, PackedRows<Widened<T>> {
  using Format = Float32;
  using Element = T;
  using Weight = int8_t;
  static U32 words(const T* p, int64_t left) { return (U32)load_up_to(p, left); }
  static void pack(const int8_t* from, Word* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      to[i] = __builtin_bit_cast(uint32_t, (float)from[i]);
  }
};

#if defined(__AVX512VNNI__)
// int8 weights by the bytes of x. vpdpbusd takes one side without sign: the weight's, plus 128.
template <class T> struct Bytes {
  using Format = Bytes;
  using Element = T;
  using Weight = int8_t;
  using Strip = bytes::Strip;
  static constexpr int kDepth = 4, kPlanes = bytes::kPlanes;
  static F32 dot(F32 sum, U32 weight, U32 x) {
    return (F32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)(weight ^ 0x80808080u), (__m512i)x);
  }
  static void pack(const int8_t* from, Word* to, int64_t n) { __builtin_memcpy(to, from, n); }
  static void pack_strip(const LinearParams& p, int64_t first, int64_t width, int64_t words, Word* to,
                         Strip& strip) {
    bytes::pack<T>(p, first, words, to, width, width / kPlanes, strip);
  }
  static void combine(const Strip* strips, int64_t stride, float* sums) {
    bytes::combine(strips, 128, stride, sums);
  }
};
template <class T> using Int8Weight = Bytes<T>;
#else
template <class T> using Int8Weight = Widened<T>;
#endif

// Adds to, or puts, the sums of kUnits rows of the weight, `unit` words apart, and a strip of kN vectors.
// Asks for as many elements of the rows from `next` on, stride `next_stride`, in the order of memory.
template <class Pair, int kN, bool kAhead>
void multiply_strip(const Word* weight, int64_t unit, const Word* x, int64_t words,
                    const typename Pair::Weight* next, int64_t next_stride, bool add, float* sums,
                    int64_t stride) {
  using Format = typename Pair::Format;
  constexpr int kAheadStride = kAhead ? 2 * kUnits * Format::kDepth * (int)sizeof(typename Pair::Weight) : 0;
  F32 sum[kUnits][kN] = {};
  if (add)
    unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
      unroll<kN>([&](auto v) FASTDLLM_INLINE { sum[u][v] = load(sums + u * stride + v * kLanes); });
    });
  const int64_t steps = kAhead ? round_up(words, 2 * kUnits) / kUnits : words; // for each row of the next
  for (int64_t w = 0; w < words; w += steps, next += next_stride)
    multiply<Format, kN, kAheadStride>(sum, weight + w, unit, 1, x + w * kN * kLanes, min(steps, words - w),
                                       (const char*)next);
  unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
    unroll<kN>([&](auto v) FASTDLLM_INLINE { store(sums + u * stride + v * kLanes, sum[u][v]); });
  });
}

// Whether rows of the weight are words as they lie.
template <class Pair> bool lies_in_words(const LinearParams& p) {
  if constexpr (Pair::kDepth * sizeof(typename Pair::Weight) != sizeof(Word))
    return false;
  return p.k % Pair::kDepth == 0 && p.weight_stride % Pair::kDepth == 0 &&
         (uintptr_t)p.weight % sizeof(Word) == 0;
}

template <class Pair> void multiply_all(const LinearParams& p, int64_t begin, int64_t end) {
  using Weight = typename Pair::Weight;
  constexpr int kDepth = Pair::kDepth;
  const int64_t words = (p.k + kDepth - 1) / kDepth, strip = kStripRows * words;
  constexpr int64_t kRows = kStripRows / Pair::kPlanes; // of x in a strip
  const int64_t strips = (p.rows + kRows - 1) / kRows;
  const int64_t stride = Pair::kPlanes == 1 ? round_up(p.rows, kItemRows) : strips * kStripRows;
  const int64_t sum_words = kGroupItems * kItemRows * stride;
  Word* x = static_cast<Word*>(
      scratch((strips * strip + sum_words + kUnits * words + words_of<typename Pair::Strip>(strips)) *
              (int64_t)sizeof(Word)));
  float* sums = (float*)(x + strips * strip);
  Word* copy = (Word*)(sums + sum_words);
  auto* found = (typename Pair::Strip*)(copy + kUnits * words);
  const auto is_narrow = [&](int64_t s) { return Pair::kPlanes == 1 && p.rows - s * kStripRows <= kLanes; };
  for (int64_t s = 0; s < strips; ++s)
    Pair::pack_strip(p, s * kRows, is_narrow(s) ? kLanes : kStripRows, words, x + s * strip, found[s]);
  const bool direct = lies_in_words<Pair>(p);
  const bool ask = p.k * (int64_t)sizeof(Weight) < kPage;

  const auto multiply_part = [&](const Item& t, int64_t k, int64_t columns, const Item& next, int64_t next_k,
                                 float* to) {
    const int64_t part = (columns + kDepth - 1) / kDepth; // words
    for (int band = 0; band < 2; ++band)
      for (int64_t u = 0; u < t.rows[band]; u += kUnits) {
        const int64_t row = t.first[band] + u, rows = min(t.rows[band] - u, kUnits);
        const Weight* ahead = u + kUnits < kBandRows ? weight_row<Weight>(p, row + kUnits) + k
                              : band == 0            ? weight_row<Weight>(p, t.first[1]) + k
                                                     : weight_row<Weight>(p, next.first[0]) + next_k;
        const Word* weight = (const Word*)(weight_row<Weight>(p, row) + k);
        int64_t unit = p.weight_stride / kDepth;
        if (!direct || rows < kUnits) {
          weight = copy;
          unit = part;
          if (rows < kUnits || part * kDepth != columns)
            __builtin_memset(copy, 0, kUnits * part * sizeof(Word));
          for (int64_t j = 0; j < rows; ++j)
            Pair::pack(weight_row<Weight>(p, row + j) + k, copy + j * part, columns);
        }
        for (int64_t s = 0; s < strips; ++s) {
          const auto multiply_one =
              is_narrow(s) ? (s || !ask ? multiply_strip<Pair, 1, false> : multiply_strip<Pair, 1, true>)
                           : (s || !ask ? multiply_strip<Pair, 2, false> : multiply_strip<Pair, 2, true>);
          const int64_t width = is_narrow(s) ? kLanes : kStripRows;
          multiply_one(weight, unit, x + s * strip + k / kDepth * width, part, ahead, p.weight_stride, k > 0,
                       to + (band * kBandRows + u) * stride + s * kStripRows, stride);
        }
      }
  };
  for_each_part(p, begin, end, kDepth, sums, stride, multiply_part, [&](const Item& t, float* of) {
    Pair::combine(found, stride, of);
    finish<typename Pair::Element>(p, t, of, stride);
  });
}

} // namespace

void linear(const LinearParams& all, int64_t from, int64_t to) {
  const int64_t most = linear_rows(all.dtype), bytes = all.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t bands = linear_bands(all);
  for (int64_t chunk = from / bands; chunk * bands < to; ++chunk) {
    const int64_t begin = max(from - chunk * bands, 0), end = min(to - chunk * bands, bands);
    const int64_t row = chunk * most;
    LinearParams p = all;
    p.rows = min(most, all.rows - row);
    p.x = (const char*)all.x + row * all.x_stride * bytes;
    p.out = (char*)all.out + row * all.n * bytes;
    const bool is_float = p.dtype == Dtype::kFloat32;
#if defined(__AMX_INT8__)
    if (p.scales)
      is_float ? amx::linear<amx::Int8<float>>(p, begin, end)
               : amx::linear<amx::Int8<BFloat16>>(p, begin, end);
    else if (!is_float)
      amx::linear<amx::Pairs>(p, begin, end);
#else
    if (p.scales)
      is_float ? multiply_all<Int8Weight<float>>(p, begin, end)
               : multiply_all<Int8Weight<BFloat16>>(p, begin, end);
    else if (!is_float)
      multiply_all<Same<NarrowFloat>>(p, begin, end);
#endif
    else
      multiply_all<Same<Float32>>(p, begin, end);
  }
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
