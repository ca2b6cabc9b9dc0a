// float16: weights that are not quantised, IEEE half precision.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct float16 : PlainFormat<float16, DType::kFloat16> {
  static constexpr char kName[] = "float16";

#if defined(__CUDACC__)
  /// A word is a pair. Rounds to bfloat16, else exact.
  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) a[i] = FromHalf2<T2>(reinterpret_cast<const __half2&>(words[i]));
  }
#endif
};

}  // namespace qmoe_plugin::formats
