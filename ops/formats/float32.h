// float32: weights that are not quantised.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct float32 : PlainFormat<float32, DType::kFloat32> {
  static constexpr char kName[] = "float32";

#if defined(__CUDACC__)
  /// Two words are a pair. Rounds to 16-bit types, else exact.
  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i)
      a[i] = FromFloat2<T2>(
          make_float2(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1])));
  }
#endif
};

}  // namespace qmoe_plugin::formats
