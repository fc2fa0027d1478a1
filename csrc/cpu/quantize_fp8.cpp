// quantize_fp8: values = x / scale, rounded to e4m3fn (core/fp8.h), scale = max |x| / 448 of every row.
//
// x [rows, k], x_stride between rows; values [rows, k] contiguous; scales [rows].
//
// Bytes: x read and the values written once; the second pass over a row finds it in the cache. Work: an item
// is a row; lanes run over its elements.
#include "cpu/fp8.h"
#include "cpu/kernels.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {

template <class T> void quantise_rows(const QuantizeFp8Params& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    p.scales[row] =
        quantise(static_cast<const T*>(p.x) + row * p.x_stride, (Fp8*)(p.values + row * p.k), p.k);
}

} // namespace

void quantize_fp8(const QuantizeFp8Params& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::kFloat32)
    quantise_rows<float>(p, begin, end);
  else
    quantise_rows<BFloat16>(p, begin, end);
}

} // namespace fastdllm::cpu::FASTDLLM_ISA
