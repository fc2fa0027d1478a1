// rms_norm: y = weight * (x / sqrt(mean x^2 + eps)); add_rms_norm: residual += x, y = rms_norm(residual).
//
// x [rows, hidden], x_stride between rows; residual, y [rows, hidden] contiguous; weight [hidden].
// Statistics in float32; residual, the normalised value and the product are each rounded to the dtype.
//
// Bytes: x read and y written once, a residual read and written once; the second pass over a row finds it in
// the cache. Work: an item is a row; lanes run over its elements.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

template <class T> void normalise(const RmsNormParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.hidden;
    T* residual = p.residual ? static_cast<T*>(p.residual) + row * p.hidden : nullptr;
    F32 squares{};
    for (int64_t i = 0; i < p.hidden; i += kLanes) {
      const int64_t left = p.hidden - i;
      F32 value = load_up_to(x + i, left);
      if (residual) {
        value = rounded<T>(load_up_to(residual + i, left) + value);
        store_up_to(residual + i, left, value);
      }
      squares += value * value;
    }
    const float mean = reduce_add(squares) / (float)p.hidden;
    const F32 scale = broadcast(1.0f / __builtin_sqrtf(mean + p.eps));
    const T* source = residual ? residual : x;
    for (int64_t i = 0; i < p.hidden; i += kLanes) {
      const int64_t left = p.hidden - i;
      const F32 value = rounded<T>(load_up_to(source + i, left) * scale);
      store_up_to(out + i, left, load_up_to(weight + i, left) * value);
    }
  }
}

} // namespace

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    normalise<float>(p, begin, end);
  else
    normalise<BFloat16>(p, begin, end);
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
