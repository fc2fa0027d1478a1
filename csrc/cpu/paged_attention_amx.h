// The bfloat16 inner loop of paged_attention on the tile unit: C[16][16] += A[16][32] B[32][16] an
// instruction, B as 16 rows of 16 pairs. head_dim must be a multiple of kHeadDimMultiple.
//
//   S^T [key][row]   = K   (A: as it lies in its page)  Q^T (B: packed once an item into [word][16 rows])
//   O   [row][dim]  += P   (A)                          V   (B: two keys interleaved, a block at a time)
//
// The softmax is vertical as in paged_attention.cpp: rows in the lanes. P leaves it with two keys in a word
// and is turned to [row][key] in registers. The interleaving works within 128 bits, so that the columns of O
// are out of order by fours; they are put back when out is written.
//
// Pages of fp8 are widened to bfloat16 a block at a time, K into a buffer, V as it is interleaved. Their
// scales meet the scores and the weights in the softmax.
#pragma once

#include "cpu/paged_attention.h"
#include "cpu/tiles.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {
namespace amx {

constexpr int kHeadDimMultiple = 32;
constexpr int kBlockKeys = 256;
constexpr int kTileKeys = 32; // keys that a multiplication with V sums over
constexpr int kPairRows = 2 * kTile;

struct Scratch {
  Word* q;        // [strip][word of head_dim][16 rows]
  float* o;       // [row][dim], out of order within 32 dims
  float* s;       // [key][32 rows]
  Word* p;        // [32 rows][key / 2]
  Word* v;        // [key / 2][dim], out of order within 32 dims
  BFloat16* k;    // [key][dim], of fp8
  float* k_scale; // [key], of fp8
  float* v_scale; // [key], likewise
  float* maximum; // [row]
  float* total;   // [row]
  float* rescale; // [32 rows]
};

template <class Stored> inline Scratch carve(int64_t head_dim) {
  constexpr int64_t kRows = kAttentionTileRows;
  const int64_t fp8_words = is_fp8<Stored> ? kBlockKeys / 2 * head_dim + 2 * kBlockKeys : 0;
  const int64_t words = kRows * head_dim / 2 + kRows * head_dim + kBlockKeys * kPairRows +
                        kPairRows * kBlockKeys / 2 + kBlockKeys / 2 * head_dim + 2 * kRows + kPairRows +
                        fp8_words;
  Word* at = static_cast<Word*>(scratch(words * sizeof(Word)));
  const auto take = [&](int64_t n) {
    Word* r = at;
    at += n; // every part is a multiple of 64 bytes
    return r;
  };
  Scratch r{};
  r.q = take(kRows * head_dim / 2);
  r.o = (float*)take(kRows * head_dim);
  r.s = (float*)take(kBlockKeys * kPairRows);
  r.p = take(kPairRows * kBlockKeys / 2);
  r.v = take(kBlockKeys / 2 * head_dim);
  r.maximum = (float*)take(kRows);
  r.total = (float*)take(kRows);
  r.rescale = (float*)take(kPairRows);
  if constexpr (is_fp8<Stored>) {
    r.k = (BFloat16*)take(kBlockKeys / 2 * head_dim);
    r.k_scale = (float*)take(kBlockKeys);
    r.v_scale = (float*)take(kBlockKeys);
  }
  return r;
}

// Two keys of one row as a word, the even one below.
inline __m512i to_words(F32 even, F32 odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_maskz_permutexvar_epi16(0xffffffff, order, both);
}

// The values and keys of the next block, asked for a few lines at a time throughout this one: memory is busy
// all the time, and never so busy that the arithmetic waits for a free line buffer. A line of fp8, which
// lasts twice as long, is asked for twice.
template <class Stored> class Ahead {
public:
  Ahead(const PagedAttentionParams& p, const Item& t, int64_t key) : chunk_lines_(p.head_dim / 2) {
    const bool last = key + kBlockKeys >= t.keys; // then comes, as a rule, the next head
    const int64_t next = last ? 0 : key + kBlockKeys,
                  head = last ? min(t.kv_head + 1, p.kv_heads - 1) : t.kv_head;
    for (int64_t i = 0; i < kChunks; ++i) {
      const int64_t j = next + i * kTile;
      const int64_t at = key_offset(p, t, head, j < t.keys ? j : next);
      chunks_[i] = (const char*)(static_cast<const Stored*>(p.v_pages) + at);
      chunks_[kChunks + i] = (const char*)(static_cast<const Stored*>(p.k_pages) + at);
    }
    line_ = chunks_[0];
    left_ = chunk_lines_;
  }

  template <int kLines> void fetch() {
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i)
      __builtin_prefetch(line_ + i * kStep, 0, 2);
    line_ += kLines * kStep;
    left_ -= kLines;
    if (left_ <= 0 && chunk_ + 1 < 2 * kChunks) {
      line_ = chunks_[++chunk_];
      left_ = chunk_lines_;
    }
  }

private:
  static constexpr int kStep = 32 * (int)sizeof(Stored); // bytes
  static constexpr int kChunks = kBlockKeys / kTile;     // 16 keys lie together
  const char* chunks_[2 * kChunks];
  const char* line_;
  int64_t chunk_lines_, left_;
  int chunk_ = 0;
};

// Where key j of the block that begins at `key` can be loaded into a tile, with the 15 after it.
template <class Stored>
inline const BFloat16* tile_keys(const PagedAttentionParams& p, const Item& t, const Scratch& w, int64_t key,
                                 int64_t j) {
  if constexpr (is_fp8<Stored>)
    return w.k + j * p.head_dim;
  else
    return static_cast<const Stored*>(p.k_pages) + key_offset(p, t, t.kv_head, key + j);
}

// S of n keys (rounded up to whole tiles) for one or two strips of 16 rows.
template <int kStrips, class Stored>
inline void scores(const PagedAttentionParams& p, const Item& t, const Scratch& w, int64_t key, int64_t n,
                   const Word* q, Ahead<Stored>& ahead) {
  float* s = w.s;
  const int64_t row_bytes = p.head_dim * sizeof(BFloat16), strip_words = kTile * p.head_dim / 2;
  constexpr int64_t kSBytes = kPairRows * sizeof(float);
  for (int64_t j = 0; j < n; j += 2 * kTile) {
    const BFloat16* k0 = tile_keys<Stored>(p, t, w, key, j);
    const bool two = j + kTile < n;
    const BFloat16* k1 = two ? tile_keys<Stored>(p, t, w, key, j + kTile) : k0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < p.head_dim; d += 32) {
      _tile_loadd(4, k0 + d, row_bytes);
      _tile_loadd(6, q + d / 2 * kTile, 64);
      ahead.template fetch<16>();
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kStrips == 2) {
        _tile_loadd(7, q + strip_words + d / 2 * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_loadd(5, k1 + d, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kStrips == 2)
        _tile_dpbf16ps(3, 5, 7);
    }
    float* to = s + j * kPairRows;
    _tile_stored(0, to, kSBytes);
    if constexpr (kStrips == 2)
      _tile_stored(1, to + kTile, kSBytes);
    _tile_stored(2, to + kTile * kPairRows, kSBytes);
    if constexpr (kStrips == 2)
      _tile_stored(3, to + kTile * kPairRows + kTile, kSBytes);
  }
}

// P of one strip of 16 rows from S; true if what was summed before must be rescaled.
template <class Stored>
inline bool softmax(const float* s, int64_t n, float factor, const float* k_scale, const float* v_scale,
                    float* maximum, float* total, float* rescale, Word* p, Ahead<Stored>& ahead) {
  const F32 same = broadcast(factor), before = load(maximum);
  const auto f = [&](int64_t key) { // what a score is multiplied with
    if constexpr (is_fp8<Stored>)
      return same * broadcast(k_scale[key]);
    else
      return same;
  };
  const auto weight = [&](F32 x, int64_t key) {
    if constexpr (is_fp8<Stored>)
      return x * broadcast(v_scale[key]);
    else
      return x;
  };
  constexpr int kChains = 4;
  F32 chains[kChains] = {before, before, before, before};
  int64_t j = 0;
  for (; j + kChains <= n; j += kChains)
    unroll<kChains>([&](auto i) FASTDLLM_INLINE {
      chains[i] = max(load(s + (j + i) * kPairRows) * f(j + i), chains[i]);
    });
  for (; j < n; ++j)
    chains[0] = max(load(s + j * kPairRows) * f(j), chains[0]);
  const F32 m = max(max(chains[0], chains[1]), max(chains[2], chains[3]));
  store(maximum, m);
  const F32 minus_m = select(m == broadcast(kMinusInfinity), F32{}, -m); // nothing but -inf: 2^(-inf - 0) = 0
  const F32 a = exp2<5>(before + minus_m);
  store(rescale, a);
  F32 sum = load(total) * a;
  const auto probability = [&](int64_t key) {
    return exp2<3>(fma(load(s + key * kPairRows), f(key), minus_m));
  };
  for (j = 0; j < n; j += kTileKeys) {
    __m512i words[16];
    if (n - j >= kTileKeys) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const F32 x = probability(j + 2 * i), y = probability(j + 2 * i + 1);
        sum += x + y;
        words[i] = to_words(weight(x, j + 2 * i), weight(y, j + 2 * i + 1));
        ahead.template fetch<3>();
      }
    } else { // no probability past the last key
      for (int i = 0; i < 16; ++i) {
        const int64_t key = j + 2 * i;
        const F32 x = key < n ? probability(key) : F32{}, y = key + 1 < n ? probability(key + 1) : F32{};
        sum += x + y;
        words[i] = to_words(key < n ? weight(x, key) : x, key + 1 < n ? weight(y, key + 1) : y);
      }
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      store_words(p + i * (kBlockKeys / 2) + j / 2, (U32)words[i]);
  }
  store(total, sum);
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0;
}

// 32 elements.
inline __m512i load_row(const BFloat16* p) { return _mm512_loadu_si512(p); }
inline __m512i load_row(const Fp8* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

// K of n keys as bfloat16, and the scales; of keys past them whatever lies there.
inline void widen_keys(const PagedAttentionParams& p, const Item& t, int64_t key, int64_t n,
                       const Scratch& w) {
  for (int64_t j = 0; j < n; j += kTile)
    widen(static_cast<const Fp8*>(p.k_pages) + key_offset(p, t, t.kv_head, key + j), w.k + j * p.head_dim,
          kTile * p.head_dim);
  gather_scales(p, t, key, n, w.k_scale, w.v_scale);
}

// V of n keys, two keys interleaved, with zeros up to a multiple of kTileKeys keys.
template <class Stored>
inline void interleave_values(const PagedAttentionParams& p, const Item& t, int64_t key, int64_t n, Word* to,
                              Ahead<Stored>& ahead) {
  const Stored* v_pages = static_cast<const Stored*>(p.v_pages);
  const int64_t head_dim = p.head_dim;
  for (int64_t j = 0; j < n; j += kTile) { // that lie together
    const Stored* even = v_pages + key_offset(p, t, t.kv_head, key + j);
    for (int64_t i = j; i < min(n, j + kTile); i += 2) {
      const bool two = i + 1 < n;
      ahead.template fetch<2>();
      for (int64_t d = 0; d < head_dim; d += 32) {
        const __m512i x = load_row(even + d);
        const __m512i y = two ? load_row(even + head_dim + d) : _mm512_setzero_si512();
        store_words(to + d, (U32)_mm512_unpacklo_epi16(x, y));
        store_words(to + d + 16, (U32)_mm512_unpackhi_epi16(x, y));
      }
      even += 2 * head_dim;
      to += head_dim;
    }
  }
  __builtin_memset(to, 0, (round_up(n, kTileKeys) - round_up(n, 2)) / 2 * head_dim * sizeof(Word));
}

// O += P V for one or two strips of 16 rows.
template <int kStrips, class Stored>
inline void values(const Word* p, const Word* v, int64_t n, int64_t head_dim, float* o,
                   Ahead<Stored>& ahead) {
  constexpr int64_t kPBytes = kBlockKeys / 2 * sizeof(Word);
  const int64_t row_bytes = head_dim * sizeof(float);
  for (int64_t d = 0; d < head_dim; d += 32) {
    float* o0 = o + d;
    float* o1 = o0 + kTile * head_dim;
    _tile_loadd(0, o0, row_bytes);
    _tile_loadd(1, o0 + kTile, row_bytes);
    if constexpr (kStrips == 2) {
      _tile_loadd(2, o1, row_bytes);
      _tile_loadd(3, o1 + kTile, row_bytes);
    }
    for (int64_t j = 0; j < n; j += kTileKeys) {
      const Word* v_j = v + j / 2 * head_dim + d;
      _tile_loadd(4, p + j / 2, kPBytes);
      _tile_loadd(6, v_j, row_bytes);
      ahead.template fetch<16>();
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v_j + kTile, row_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kStrips == 2) {
        _tile_loadd(5, p + kTile * (kBlockKeys / 2) + j / 2, kPBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, o0, row_bytes);
    _tile_stored(1, o0 + kTile, row_bytes);
    if constexpr (kStrips == 2) {
      _tile_stored(2, o1, row_bytes);
      _tile_stored(3, o1 + kTile, row_bytes);
    }
  }
}

template <class Stored> inline void attend(const PagedAttentionParams& p, const Item& t) {
  const int64_t head_dim = p.head_dim, words = head_dim / 2;
  const int64_t strips = (t.rows + kTile - 1) / kTile;
  const Scratch w = carve<Stored>(head_dim);

  const BFloat16* q = static_cast<const BFloat16*>(p.q);
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int64_t d = 0; d < words; d += 16) {
      __m512i x[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t r = strip * kTile + i;
        x[i] = r < t.rows ? _mm512_loadu_si512(q + row_offset(p, t, r) + 2 * d) : _mm512_setzero_si512();
      }
      transpose(x);
      for (int i = 0; i < 16; ++i)
        store_words(w.q + (strip * words + d + i) * kTile, (U32)x[i]);
    }
  __builtin_memset(w.o, 0, strips * kTile * head_dim * sizeof(float));
  for (int64_t r = 0; r < strips * kTile; ++r) {
    w.maximum[r] = kMinusInfinity;
    w.total[r] = 0;
  }

  const float factor = p.scale * kLog2e;
  for (int64_t key = 0; key < t.keys; key += kBlockKeys) {
    const int64_t n = min(kBlockKeys, t.keys - key);
    Ahead<Stored> ahead(p, t, key);
    if constexpr (is_fp8<Stored>)
      widen_keys(p, t, key, n, w);
    interleave_values(p, t, key, n, w.v, ahead);
    for (int64_t strip = 0; strip < strips; strip += 2) {
      const bool two = strip + 1 < strips;
      const Word* q_pair = w.q + strip * kTile * words;
      float* o = w.o + strip * kTile * head_dim;
      memory_barrier();
      if (two)
        scores<2>(p, t, w, key, n, q_pair, ahead);
      else
        scores<1>(p, t, w, key, n, q_pair, ahead);
      bool changed = false;
      for (int64_t i = 0; i < (two ? 2 : 1); ++i) {
        const int64_t row = (strip + i) * kTile;
        changed |= softmax(w.s + i * kTile, n, factor, w.k_scale, w.v_scale, w.maximum + row, w.total + row,
                           w.rescale + i * kTile, w.p + i * kTile * (kBlockKeys / 2), ahead);
      }
      if (changed)
        for (int64_t r = 0; r < (two ? 2 : 1) * kTile; ++r) {
          const F32 a = broadcast(w.rescale[r]);
          float* row = o + r * head_dim;
          for (int64_t d = 0; d < head_dim; d += kLanes)
            store(row + d, load(row + d) * a);
        }
      memory_barrier();
      if (two)
        values<2>(w.p, w.v, n, head_dim, o, ahead);
      else
        values<1>(w.p, w.v, n, head_dim, o, ahead);
    }
  }

  // Of 32 dims, the first tile holds 0-3, 8-11, 16-19, 24-27 and the second the others.
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  for (int64_t r = 0; r < t.rows; ++r) {
    BFloat16* to = static_cast<BFloat16*>(p.out) + row_offset(p, t, r);
    const F32 inverse = broadcast(1.0f / w.total[r]);
    for (int64_t d = 0; d < head_dim; d += 32) {
      const __m512 x = (__m512)load(w.o + r * head_dim + d), y = (__m512)load(w.o + r * head_dim + d + kTile);
      const F32 a = (F32)_mm512_permutex2var_ps(x, low, y) * inverse;
      const F32 b = (F32)_mm512_permutex2var_ps(x, high, y) * inverse;
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
      __builtin_memcpy(to + d, &both, sizeof both);
    }
  }
}

} // namespace amx
} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
