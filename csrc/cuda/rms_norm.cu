// rms_norm: y = weight * (x / sqrt(mean x^2 + eps)); add_rms_norm: residual += x, y = rms_norm(residual).
//
//   x [rows, hidden], x_stride between rows; residual, y [rows, hidden] contiguous; weight [hidden]
//
// Statistics in float32; residual, the normalised value and the product are each rounded to the dtype, as the
// module-by-module model rounds them.
//
// A block takes a row, a thread every kThreads-th vector of 16 bytes. The first kRow elements stay in
// registers between the statistics and the result, so that rows up to that length are read once; what lies
// behind is read twice. Bytes: x and y once; with a residual, that read and written once as well.
//
// Which elements a thread adds up depends on hidden alone: the bits are those of any batch and alignment.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRow = 8192;

struct Shared {
  float sums[kWarp];
};

template <class T, bool kWhole> __global__ void __launch_bounds__(kThreads, 2) normalise(RmsNormParams p) {
  constexpr int kStride = kThreads * kVector<T>;
  constexpr int kHeld = kRow / kStride;
  const int64_t hidden = p.hidden, row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = p.residual ? static_cast<T*>(p.residual) + row * hidden : nullptr;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * hidden;

  float squares = 0;
  const auto take = [&](int64_t first) {
    Vector<T> v = load_vector<kWhole>(x, first, hidden);
    if (residual) {
      const Vector<T> r = load_vector<kWhole>(residual, first, hidden);
      unroll<kVector<T>>([&](int j) { v.x[j] = from_float<T>(to_float(r.x[j]) + to_float(v.x[j])); });
      store_vector<kWhole>(residual, first, hidden, v);
    }
    unroll<kVector<T>>([&](int j) { squares += to_float(v.x[j]) * to_float(v.x[j]); });
    return v;
  };
  const int64_t mine = static_cast<int64_t>(threadIdx.x) * kVector<T>;
  Vector<T> held[kHeld] = {};
  unroll<kHeld>([&](int i) {
    if (mine + i * kStride < hidden)
      held[i] = take(mine + i * kStride);
  });
  for (int64_t first = mine + kRow; first < hidden; first += kStride)
    take(first);

  const float sum = block_reduce(squares, 0.0f, Sum{}, shared_memory<Shared>().sums);
  const float scale = rsqrtf(sum / static_cast<float>(hidden) + p.eps);
  const auto put = [&](int64_t first, Vector<T> v) {
    const Vector<T> w = load_vector<kWhole>(weight, first, hidden);
    unroll<kVector<T>>([&](int j) {
      v.x[j] = from_float<T>(to_float(w.x[j]) * to_float(from_float<T>(to_float(v.x[j]) * scale)));
    });
    store_vector<kWhole>(out, first, hidden, v);
  };
  unroll<kHeld>([&](int i) {
    if (mine + i * kStride < hidden)
      put(mine + i * kStride, held[i]);
  });
  for (int64_t first = mine + kRow; first < hidden; first += kStride)
    put(first, load_vector<kWhole>(residual ? residual : x, first, hidden));
}

} // namespace

const char* rms_norm(const RmsNormParams& p, void* stream) {
  if (p.rows == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = is_whole<T>(p.x, p.x_stride) && is_whole<T>(p.residual, p.hidden) &&
                       is_whole<T>(p.weight, 0) && is_whole<T>(p.out, p.hidden);
    return launch(whole ? normalise<T, true> : normalise<T, false>, dim3(grid_size(p.rows)), kThreads,
                  sizeof(Shared), on, p);
  });
}

} // namespace fastdllm::cuda
