// What the nodes MatMulBlockQuantizedFp8Weight and MatMulBlockQuantizedFp4Weight of a model mean:
// MatMulNBits with other formats. Knows no ONNX Runtime.
//
// G = ceil(K / block_size), a power of two. All but A constant.
//   Fp8Weight  B float8e4m3fn [N, K], b_scale float [N, G], a_scale float32 scalar (A is quantised by
//              it), bias [N]
//   Fp4Weight  B uint8 [N, K / 2] of e2m1 codes, weight_scale e4m3 [N, G] as uint8 or float8e4m3fn,
//              weight_scale_2 float32 scalar, input_scale (of no effect, as in com.microsoft), bias [N]
#pragma once

#include <vector>

#include "ops/ort/matmul_nbits_node.h"

namespace qmoe_plugin::ort {

/// The inputs by number; the names are those of com.microsoft.
enum class Fp8WeightInput : size_t { kA, kB, kBScale, kAScale, kBias, kCount };
enum class Fp4WeightInput : size_t {
  kA,
  kB,
  kWeightScale,
  kWeightScale2,
  kInputScale,
  kBias,
  kCount
};

inline constexpr int64_t kFp8WeightBlockSize = 128, kFp4WeightBlockSize = 16;  // by default

/// Check the node and say what it means. `inputs` are the tensors by number; A is not looked at. Throw
/// Error.
MatMulNBitsNode InterpretFp8Weight(int64_t block_size, const std::vector<TensorView>& inputs,
                                   DType dtype);
MatMulNBitsNode InterpretFp4Weight(int64_t block_size, const std::vector<TensorView>& inputs,
                                   DType dtype);

}  // namespace qmoe_plugin::ort
