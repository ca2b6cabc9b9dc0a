// bfloat16: weights that are not quantised, the upper half of a float32.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct bfloat16 : PlainFormat<bfloat16, DType::kBFloat16> {
  static constexpr char kName[] = "bfloat16";

#if defined(__CUDACC__)
  /// A word is a pair. Rounds to float16 (with overflow), else exact.
  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T2, __nv_bfloat162>)
        a[i] = reinterpret_cast<const __nv_bfloat162&>(words[i]);
      else
        a[i] = FromFloat2<T2>(
            make_float2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)));
    }
  }
#endif
};

}  // namespace qmoe_plugin::formats
