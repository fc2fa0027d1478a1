// quantize_fp8: values = x / scale, rounded to e4m3fn (core/fp8.h), scale = max |x| / 448 of every row.
//
//   x [rows, k], x_stride between rows; values [rows, k] contiguous; scales [rows]
//
// A true division, as on the CPU, whose bits these are. Magnitudes are compared as the integers of their
// bits: those have the order of the numbers, infinity behind them and NaN last, so that neither can get lost.
//
// A block takes a row, a thread every kThreads-th vector of 16 bytes of x. The first kHeld vectors of a
// thread stay in registers between the maximum and the values: rows of up to 12,288 16-bit numbers,
// LLaDA-8B's longest, are read once; what lies behind is read twice. Bytes: x read and the values written
// once.
#include "core/fp8.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kHeld = 3;

struct Shared {
  uint32_t largest[kWarp];
};

template <class T, bool kWhole> __global__ void __launch_bounds__(kThreads, 2) quantize(QuantizeFp8Params p) {
  constexpr int kStride = kThreads * kVector<T>;
  const int64_t k = p.k, row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  uint8_t* values = p.values + row * k;

  uint32_t largest = 0;
  const auto take = [&](int64_t first) {
    const Vector<T> v = load_vector<kWhole>(x, first, k);
    unroll<kVector<T>>(
        [&](int j) { largest = Most{}(largest, __float_as_uint(to_float(v.x[j])) & 0x7fffffff); });
    return v;
  };
  const int64_t mine = static_cast<int64_t>(threadIdx.x) * kVector<T>;
  Vector<T> held[kHeld] = {};
  unroll<kHeld>([&](int i) {
    if (mine + i * kStride < k)
      held[i] = take(mine + i * kStride);
  });
  for (int64_t first = mine + kHeld * kStride; first < k; first += kStride)
    take(first);

  largest = block_reduce(largest, 0u, Most{}, shared_memory<Shared>().largest);
  const float scale = fp8_scale(__uint_as_float(largest));
  if (threadIdx.x == 0)
    p.scales[row] = scale;
  const auto put = [&](int64_t first, const Vector<T>& v) {
    Pack<uint8_t, kVector<T>> out;
    unroll<kVector<T>>([&](int j) { out.x[j] = to_fp8(to_float(v.x[j]) / scale); });
    store_vector<kWhole>(values, first, k, out);
  };
  unroll<kHeld>([&](int i) {
    if (mine + i * kStride < k)
      put(mine + i * kStride, held[i]);
  });
  for (int64_t first = mine + kHeld * kStride; first < k; first += kStride)
    put(first, load_vector<kWhole>(x, first, k));
}

} // namespace

const char* quantize_fp8(const QuantizeFp8Params& p, void* stream) {
  if (p.rows == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole =
        is_whole<T>(p.x, p.x_stride) && is_aligned(p.values, kVector<T>) && p.k % kVector<T> == 0;
    return launch(whole ? quantize<T, true> : quantize<T, false>, dim3(grid_size(p.rows)), kThreads,
                  sizeof(Shared), on, p);
  });
}

} // namespace fastdllm::cuda
