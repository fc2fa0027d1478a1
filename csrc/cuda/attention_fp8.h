// Keys and values of fp8 for paged_attention: they come into shared memory as they are, and a tile of them is
// widened to the elements that the arithmetic takes before it is used.
//
// A number of e4m3 whose sign, exponent and mantissa are put into the fields of a wider format is the same
// number times a power of two, by which the biases of their exponents differ: denormals too. bfloat16 and
// float are multiplied with the inverse, 2^120. In Float16 that is 2^8, which meets the scales instead: so
// weights times the scales of their values, which are 1/448 of what values may be, keep clear of Float16's
// denormals.
#pragma once

#include "cuda/attention_pipeline.h"

namespace fastdllm::cuda {

// Numbers [kKeys][head_dim] without gaps, and their scales, as they are in pages.
template <int kDim, int kKeys> struct alignas(16) Fp8Stage {
  uint8_t k[kKeys * kDim], v[kKeys * kDim];
  float k_scales[kKeys], v_scales[kKeys];
};
template <class T, int kDim, int kKeys> struct ScaledRows : Stage<T, kDim, kKeys> {
  static constexpr bool kScaled = true;
  float k_scales[kKeys], v_scales[kKeys];
};

// What scales are multiplied with, since widened numbers are so much smaller.
template <class T> inline constexpr float kFp8Unit = 1;
template <> inline constexpr float kFp8Unit<Float16> = 256;

// Two numbers in the low half of `bytes` as a word.
template <class T> __device__ __forceinline__ uint32_t widen_two(uint32_t bytes);
template <> __device__ __forceinline__ uint32_t widen_two<Float16>(uint32_t bytes) {
  const uint32_t high = (bytes & 0xff) << 8 | (bytes & 0xff00) << 16;
  return (high & 0x80008000u) | (high & 0x7f007f00u) >> 1;
}
template <> __device__ __forceinline__ uint32_t widen_two<BFloat16>(uint32_t bytes) {
  const uint32_t high = (bytes & 0xff) << 8 | (bytes & 0xff00) << 16;
  constexpr uint32_t kPower = 0x7b807b80, kMinusZero = 0x80008000; // 2^120
  return fma_two((high & 0x80008000u) | (high & 0x7f007f00u) >> 4, kPower, kMinusZero);
}

inline constexpr int kWidened = 8; // numbers at a time, of which head_dim is a multiple

template <class T> __device__ __forceinline__ void widen(const uint8_t* from, T* to) {
  const auto bytes = *reinterpret_cast<const Pack<uint32_t, 2>*>(from);
  if constexpr (sizeof(T) == 4) {
    unroll<2>([&](int i) {
      Vector<float> x;
      unroll<4>([&](int j) {
        const uint32_t byte = bytes.x[i] >> 8 * j;
        x.x[j] = __uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * 0x1p120f;
      });
      *reinterpret_cast<Vector<float>*>(to + 4 * i) = x;
    });
  } else {
    Pack<uint32_t, 4> x;
    unroll<4>([&](int i) { x.x[i] = widen_two<T>(bytes.x[i / 2] >> i % 2 * 16); });
    *reinterpret_cast<Pack<uint32_t, 4>*>(to) = x;
  }
}

// The face of KeyLoader, and widen(), which makes rows of what was loaded.
template <class T, int kDim, int kKeys> class Fp8Loader : public KeyPlaces {
  static constexpr int kTogether = 16; // keys that lie side by side: a page holds a multiple
  static_assert(kKeys % kTogether == 0 && kDim % kWidened == 0);

public:
  using Stage = Fp8Stage<kDim, kKeys>;
  using Rows = ScaledRows<T, kDim, kKeys>;
  static constexpr bool kIsBulk = false, kWidens = true;

  __device__ Fp8Loader(const PagedAttentionParams& p, int64_t b, int kv_head)
      : KeyPlaces(p, b, kv_head, kKeys), k_(static_cast<const uint8_t*>(p.k_pages)),
        v_(static_cast<const uint8_t*>(p.v_pages)), k_scales_(p.k_scales), v_scales_(p.v_scales),
        head_dim_(static_cast<int>(p.head_dim)) {}

  __device__ void clear_padding(Stage*, int) const {} // widen() does

  __device__ void load(Stage& stage, int tile, uint64_t*) const {
    for (int row = 0; row < kKeys; row += kTogether) {
      const int key = tile * kKeys + row;
      const int64_t place = place_of(key), from = place * head_dim_;
      const bool live = key < kv_len();
      for (int i = threadIdx.x; i < head_dim_; i += kAttentionThreads) {
        cp_async_16(stage.k + row * head_dim_ + 16 * i, k_ + from + 16 * i, live);
        cp_async_16(stage.v + row * head_dim_ + 16 * i, v_ + from + 16 * i, live);
      }
      if (const int i = 4 * threadIdx.x; i < kTogether) {
        cp_async_16(stage.k_scales + row + i, k_scales_ + place + i, live);
        cp_async_16(stage.v_scales + row + i, v_scales_ + place + i, live);
      }
    }
  }

  // Zeros in keys behind head_dim, which are multiplied by Q's. Past the end of the sequence scales of values
  // are zero, where they meet weights of zero; the numbers may be any, for all are finite.
  __device__ void widen(const Stage& stage, Rows& rows, int tile) const {
    constexpr int kColumns = kDim / kWidened;
    const int keys = kv_len() - tile * kKeys;
    for (int i = threadIdx.x; i < kKeys * kColumns; i += kAttentionThreads) {
      const int row = i / kColumns, column = i % kColumns * kWidened;
      T *k = rows.k[row].x + column, *v = rows.v[row].x + column;
      if (column < head_dim_) {
        cuda::widen<T>(stage.k + row * head_dim_ + column, k);
        cuda::widen<T>(stage.v + row * head_dim_ + column, v);
      } else {
        unroll<kWidened>([&](int j) { k[j] = T{}; });
      }
    }
    if (const int i = threadIdx.x; i < kKeys) {
      rows.k_scales[i] = stage.k_scales[i] * kFp8Unit<T>;
      rows.v_scales[i] = i < keys ? stage.v_scales[i] * kFp8Unit<T> : 0;
    }
  }

private:
  const uint8_t *k_, *v_;
  const float *k_scales_, *v_scales_;
  int head_dim_;
};

} // namespace fastdllm::cuda
