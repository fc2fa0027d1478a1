// out[i, h] = sum_j softmax_j(scale q[i, h] . k[j, h / G]) v[j, h / G],  G = q_heads / kv_heads
//
// q, out [tokens, q_heads, head_dim]; k_pages, v_pages [pages, kv_heads, page_size, head_dim]; key j of a
// sequence is row j % page_size of page block_table[j / page_size].
//
// Bytes: K and V once for each KV head and query tile, q and out once. A tile is up to kAttentionTileRows
// rows of (query, head of the group), so that a block step reads every key once, whatever the group.
//
// Work: an item is (sequence, KV head, tile). It runs over blocks of kBlockKeys keys with the online softmax
//   S = scale log2(e) K Q^T,  m' = max(m, max_j S_j),  P_j = 2^(S_j - m'),  a = 2^(m - m'),
//   l' = a l + sum_j P_j,  O' = a O + V^T P,  out = O / l
// in float32. Queries lie in the lanes: S [key][row], O [dim][row], so that the softmax is vertical and K and
// V are read as they lie, one element broadcast to all lanes. A strip of two vectors of rows is worked on at
// a time. Key blocks start at multiples of kBlockKeys: the bits of a row do not depend on the other sequences
// or on the split of the list.
//
// Element formats: float32 reads K and V from the pages; bfloat16 is widened to float32 a block at a time,
// or, where there is vdpbf16ps, is multiplied in pairs: K as it lies (pairs of dims), V with two keys
// interleaved. With a tile unit it has an inner loop of its own, paged_attention_amx.h.
//
// Pages of fp8 with scales k_scale, v_scale of each key and value: half the bytes. They are widened to the
// format's elements a block at a time, exactly; S_j is multiplied with k_scale_j, and P_j, once it is in l,
// with v_scale_j.
//
// Assumes: head_dim a multiple of 8 up to 256; page_size 16, 32 or 64; block_table entries valid for the
// first ceil(kv_len / page_size) pages. Slots past kv_len are read as keys (the scores are dropped) and never
// as values, so what they hold does not matter.
#include "cpu/paged_attention.h"
#if defined(__AMX_BF16__)
#include "cpu/paged_attention_amx.h"
#endif

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

constexpr int kBlockKeys = 64;
constexpr int kMaxPages = kBlockKeys / 16; // of a block
constexpr int kStripRows = 2 * kLanes;
static_assert(kAttentionTileRows % kStripRows == 0);

// The pages of up to kBlockKeys keys of one KV head.
template <class Stored> struct Block {
  const Stored* k[kMaxPages];
  const Stored* v[kMaxPages];
};

// What an item needs beside its arguments; lives in the thread's scratch memory.
struct Scratch {
  Word* q;        // [strip][word of head_dim][row]
  float* o;       // [strip][dim][row]
  Word* s;        // [key][row]: scores as float32, then probabilities as words
  Word* k;        // [key][dim], where the format packs K
  Word* v;        // [key / kDepth][dim], where the format packs V
  float* k_scale; // [key], of fp8
  float* v_scale; // [key], likewise
  float* row;     // [dim]
  float* maximum; // [strip][row]
  float* total;   // [strip][row]
};

inline Scratch carve(int64_t head_dim) {
  constexpr int64_t kRows = kAttentionTileRows;
  const int64_t words = 2 * kRows * head_dim + kBlockKeys * kStripRows + 2 * kBlockKeys * head_dim +
                        head_dim + 2 * kBlockKeys + 2 * kRows + 10 * 16;
  Word* p = static_cast<Word*>(scratch(words * sizeof(Word)));
  const auto take = [&](int64_t n) {
    Word* r = p;
    p += round_up(n, 16); // whole cache lines
    return r;
  };
  Scratch r;
  r.q = take(kRows * head_dim);
  r.o = (float*)take(kRows * head_dim);
  r.s = take(kBlockKeys * kStripRows);
  r.k = take(kBlockKeys * head_dim);
  r.v = take(kBlockKeys * head_dim);
  r.k_scale = (float*)take(kBlockKeys);
  r.v_scale = (float*)take(kBlockKeys);
  r.row = (float*)take(head_dim);
  r.maximum = (float*)take(kRows);
  r.total = (float*)take(kRows);
  return r;
}

// Whether K and V are multiplied as they lie in the scratch memory, and not in their pages.
template <class Format, class Stored> constexpr bool kPacksK = Format::kPackK || is_fp8<Stored>;
template <class Format, class Stored> constexpr bool kPacksV = Format::kPackV || is_fp8<Stored>;

// One strip against one block of n keys: S, softmax, O.
template <class Format, class Stored, int kN, bool kAhead>
void attend_strip(const Block<Stored>& block, const Block<Stored>& next, const Scratch& w, int strip,
                  int64_t n, int64_t head_dim, int64_t page_size, float factor) {
  constexpr int kDepth = Format::kDepth;
  constexpr int64_t kRows = kN * kLanes;
  constexpr int kAheadStride = kAhead ? 2 * kUnits * kDepth * (int)sizeof(Stored) : 0;
  const int64_t words = head_dim / kDepth;
  const Word* q = w.q + strip * kStripRows * words;
  float* o = w.o + strip * kStripRows * head_dim;
  Word* s = w.s;

  for (int64_t j = 0; j < n; j += kUnits) {
    const int64_t page = j / page_size, slot = j % page_size;
    const Word* k;
    if constexpr (kPacksK<Format, Stored>)
      k = w.k + j * words;
    else
      k = (const Word*)(block.k[page] + slot * head_dim);
    F32 sum[kUnits][kN] = {};
    multiply<Format, kN, kAheadStride>(sum, k, words, 1, q, words,
                                       (const char*)(next.k[page] + slot * head_dim));
    unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
      const float f = is_fp8<Stored> ? factor * w.k_scale[j + u] : factor;
      unroll<kN>([&](auto v) FASTDLLM_INLINE {
        store_words(s + (j + u) * kRows + v * kLanes, (U32)(sum[u][v] * broadcast(f)));
      });
    });
  }

  F32 rescale[kN];
  for (int v = 0; v < kN; ++v) {
    float* maximum = w.maximum + strip * kStripRows + v * kLanes;
    float* total = w.total + strip * kStripRows + v * kLanes;
    Word* column = s + v * kLanes;
    const F32 before = load(maximum);
    F32 m = before;
    for (int64_t j = 0; j < n; ++j)
      m = max((F32)load_words(column + j * kRows), m);
    store(maximum, m);
    m = select(m == broadcast(kMinusInfinity), F32{}, m); // all scores -inf so far: 2^(-inf - 0) = 0
    rescale[v] = exp2<5>(before - m);                     // 1 exactly where the maximum stays
    F32 sum = load(total) * rescale[v];
    const auto probability = [&](int64_t j) {
      return exp2<Format::kExpDegree>((F32)load_words(column + j * kRows) - m);
    };
    for (int64_t j = 0; j < n; j += kDepth) { // word j / kDepth replaces a row that has been read
      F32 x = probability(j), y{};
      sum += x;
      if constexpr (kDepth == 2) {
        if (j + 1 < n)
          y = probability(j + 1);
        sum += y;
      }
      if constexpr (is_fp8<Stored>) {
        x *= broadcast(w.v_scale[j]);
        if (kDepth == 2 && j + 1 < n)
          y *= broadcast(w.v_scale[j + 1]);
      }
      store_words(column + j / kDepth * kRows, Format::to_word(x, y));
    }
    store(total, sum);
  }

  for (int64_t d = 0; d < head_dim; d += kUnits) {
    F32 sum[kUnits][kN];
    unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
      unroll<kN>([&](auto v)
                     FASTDLLM_INLINE { sum[u][v] = load(o + (d + u) * kRows + v * kLanes) * rescale[v]; });
    });
    for (int64_t page = 0, j = 0; j < n; ++page, j += page_size) {
      const Word* v;
      if constexpr (kPacksV<Format, Stored>)
        v = w.v + j / kDepth * head_dim;
      else
        v = (const Word*)block.v[page];
      const int64_t steps = (min(n - j, page_size) + kDepth - 1) / kDepth;
      multiply<Format, kN, kAheadStride>(sum, v + d, 1, head_dim, s + j / kDepth * kRows, steps,
                                         (const char*)(next.v[page] + d * page_size));
    }
    unroll<kUnits>([&](auto u) FASTDLLM_INLINE {
      unroll<kN>([&](auto v) FASTDLLM_INLINE { store(o + (d + u) * kRows + v * kLanes, sum[u][v]); });
    });
  }
}

inline int strip_count(const Item& t) { return (int)((t.rows + kStripRows - 1) / kStripRows); }
inline int strip_vectors(const Item& t, int strip) { return t.rows - strip * kStripRows > kLanes ? 2 : 1; }

// Packs the rows of q, zeros in lanes without one, and clears the sums.
template <class Format> void begin_item(const PagedAttentionParams& p, const Item& t, const Scratch& w) {
  using Element = typename Format::Element;
  const int64_t head_dim = p.head_dim, words = head_dim / Format::kDepth;
  for (int strip = 0; strip < strip_count(t); ++strip) {
    const int64_t first = strip * kStripRows, width = strip_vectors(t, strip) * kLanes;
    for (int64_t r = 0; r < width; ++r) {
      Word* row = (Word*)w.row;
      if (first + r < t.rows)
        Format::pack(static_cast<const Element*>(p.q) + row_offset(p, t, first + r), row, head_dim);
      else
        __builtin_memset(row, 0, words * sizeof(Word));
      for (int64_t i = 0; i < words; ++i)
        w.q[first * words + i * width + r] = row[i];
      w.maximum[first + r] = kMinusInfinity;
      w.total[first + r] = 0;
    }
    __builtin_memset(w.o + first * head_dim, 0, width * head_dim * sizeof(float));
  }
}

// out = O / l
template <class Format> void end_item(const PagedAttentionParams& p, const Item& t, const Scratch& w) {
  using Element = typename Format::Element;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int strip = (int)(r / kStripRows);
    const int64_t first = strip * kStripRows, width = strip_vectors(t, strip) * kLanes;
    const float* o = w.o + first * p.head_dim + (r - first);
    const float inverse = 1.0f / w.total[r];
    for (int64_t d = 0; d < p.head_dim; ++d)
      w.row[d] = o[d * width] * inverse;
    Element* out = static_cast<Element*>(p.out) + row_offset(p, t, r);
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes)
      store(out + d, load(w.row + d));
    if (d < p.head_dim)
      store_first(out + d, p.head_dim - d, load_first(w.row + d, p.head_dim - d));
  }
}

template <class Stored>
Block<Stored> block_at(const PagedAttentionParams& p, const Item& t, int64_t head, int64_t key) {
  Block<Stored> block;
  for (int64_t i = 0; i < kMaxPages; ++i) { // past the last page: a page again, to prefetch from
    const int64_t j = key + i * p.page_size;
    const int64_t at = key_offset(p, t, head, j < t.keys ? j : key);
    block.k[i] = static_cast<const Stored*>(p.k_pages) + at;
    block.v[i] = static_cast<const Stored*>(p.v_pages) + at;
  }
  return block;
}

template <class Format, class Stored> void attend(const PagedAttentionParams& p, const Item& t) {
  const int64_t head_dim = p.head_dim, page_size = p.page_size, words = head_dim / Format::kDepth;
  const float factor = p.scale * kLog2e; // scores in units of log2
  const Scratch w = carve(head_dim);
  begin_item<Format>(p, t, w);
  Block<Stored> block = block_at<Stored>(p, t, t.kv_head, 0);
  for (int64_t key = 0; key < t.keys; key += kBlockKeys) {
    const int64_t n = min(kBlockKeys, t.keys - key);
    const bool last = key + kBlockKeys >= t.keys; // then comes, as a rule, the next head
    const Block<Stored> next = last ? block_at<Stored>(p, t, min(t.kv_head + 1, p.kv_heads - 1), 0)
                                    : block_at<Stored>(p, t, t.kv_head, key + kBlockKeys);
    for (int64_t page = 0, j = 0; j < n; ++page, j += page_size) {
      const int64_t keys = min(n - j, page_size);
      if constexpr (kPacksK<Format, Stored>)
        Format::pack(block.k[page], w.k + j * words, round_up(keys, kUnits) * head_dim);
      if constexpr (kPacksV<Format, Stored>)
        Format::pack_values(block.v[page], w.v + j / Format::kDepth * head_dim, keys, head_dim);
    }
    if constexpr (is_fp8<Stored>)
      gather_scales(p, t, key, n, w.k_scale, w.v_scale);
    for (int strip = 0; strip < strip_count(t); ++strip) {
      const bool one = strip_vectors(t, strip) == 1,
                 first = strip == 0; // the first strip asks for the next block
      const auto attend_one =
          one ? (first ? attend_strip<Format, Stored, 1, true> : attend_strip<Format, Stored, 1, false>)
              : (first ? attend_strip<Format, Stored, 2, true> : attend_strip<Format, Stored, 2, false>);
      attend_one(block, next, w, strip, n, head_dim, page_size, factor);
    }
    block = next;
  }
  end_item<Format>(p, t, w);
}

using Attend = void (*)(const PagedAttentionParams&, const Item&);

void run(const PagedAttentionParams& p, int64_t begin, int64_t end, Attend attend_item) {
  const int64_t element = p.dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(BFloat16);
  for (int64_t i = begin; i < end; ++i) {
    const Item t = item_at(p, i);
    if (t.rows > 0 && t.keys > 0)
      attend_item(p, t);
    else
      for (int64_t r = 0; r < t.rows; ++r)
        __builtin_memset(static_cast<char*>(p.out) + row_offset(p, t, r) * element, 0, p.head_dim * element);
  }
}

} // namespace

void paged_attention(const PagedAttentionParams& p, int64_t begin, int64_t end) {
  const bool fp8 = p.k_scales != nullptr;
  if (p.dtype == Dtype::kFloat32)
    return run(p, begin, end, fp8 ? attend<Float32, Fp8> : attend<Float32, float>);
#if defined(__AMX_BF16__)
  if (p.head_dim % amx::kHeadDimMultiple == 0) {
    const amx::Tiles tiles;
    return run(p, begin, end, fp8 ? amx::attend<Fp8> : amx::attend<BFloat16>);
  }
#endif
  run(p, begin, end, fp8 ? attend<NarrowFloat, Fp8> : attend<NarrowFloat, BFloat16>);
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
