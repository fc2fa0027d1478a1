// silu_mul: y = silu(gate) * up, silu(x) = x / (1 + exp(-x)).
//
//   gate, up [rows, columns], strided rows (often the halves of one fused matrix); y contiguous
//
// silu in float32, rounded to the dtype, then the product rounded again: what the module-by-module model
// computes. Blocks (x, y): x is a row, y a share of its columns; a thread takes one vector of 16 bytes.
// Bytes: gate and up read once, y written once.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastdllm::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, bool kWhole> __global__ void __launch_bounds__(kThreads) silu_times(SiluMulParams p) {
  const int64_t row = blockIdx.x, columns = p.columns;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector<T>;
  if (first >= columns)
    return;
  const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
  const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
  T* out = static_cast<T*>(p.out) + row * columns;
  const Vector<T> g = load_vector<kWhole>(gate, first, columns);
  Vector<T> v = load_vector<kWhole>(up, first, columns);
  unroll<kVector<T>>([&](int j) {
    const float x = to_float(g.x[j]);
    v.x[j] = from_float<T>(to_float(from_float<T>(x / (1.0f + expf(-x)))) * to_float(v.x[j]));
  });
  store_vector<kWhole>(out, first, columns, v);
}

} // namespace

const char* silu_mul(const SiluMulParams& p, void* stream) {
  if (p.rows == 0 || p.columns == 0)
    return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t kShare = kThreads * kVector<T>;
    const bool whole =
        is_whole<T>(p.gate, p.gate_stride) && is_whole<T>(p.up, p.up_stride) && is_whole<T>(p.out, p.columns);
    const dim3 grid(grid_size(p.rows), grid_size((p.columns + kShare - 1) / kShare));
    return launch(whole ? silu_times<T, true> : silu_times<T, false>, grid, kThreads, 0, on, p);
  });
}

} // namespace fastdllm::cuda
