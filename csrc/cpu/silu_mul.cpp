// silu_mul: y = silu(gate) * up, silu(x) = x / (1 + e^-x).
//
// gate, up [rows, columns], strided rows (often the halves of one fused matrix); y contiguous.
// silu in float32, rounded to the dtype, then the product rounded again. With m = e^-|x|, which cannot
// overflow, silu(x) is x / (1 + m), or x m / (1 + m) where x < 0; below -87.3, where it is smaller than
// 1e-35, it is zero.
//
// Bytes: gate and up read once, y written once. Work: an item is a row; lanes run over its elements.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

template <class T> void silu_times(const SiluMulParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* out = static_cast<T*>(p.out) + row * p.columns;
    for (int64_t i = 0; i < p.columns; i += kLanes) {
      const int64_t left = p.columns - i;
      store_up_to(out + i, left, rounded<T>(silu(load_up_to(gate + i, left))) * load_up_to(up + i, left));
    }
  }
}

} // namespace

void silu_mul(const SiluMulParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    silu_times<float>(p, begin, end);
  else
    silu_times<BFloat16>(p, begin, end);
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
