// What the nodes MatMulBlockQuantizedFp8Weight and MatMulBlockQuantizedFp4Weight of a model mean:
// MatMulNBits with other formats. Knows no ONNX Runtime.
//
// G = ceil(K / block_size), a power of two. All but A constant. N and K follow from B, unless it was
// packed before (ops/ort/packed_node.h): then attributes say them. a_scale stays an input of its own.
//   Fp8Weight  B float8e4m3fn [N, K], b_scale float [N, G], a_scale float32 scalar (A is quantised by
//              it), bias [N]
//   Fp4Weight  B uint8 [N, K / 2] of e2m1 codes, weight_scale e4m3 [N, G] as uint8 or float8e4m3fn,
//              weight_scale_2 float32 scalar, input_scale (of no effect, as in com.microsoft), bias [N]
#pragma once

#include <optional>
#include <string>
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

/// The attributes of both; all but block_size are ours.
struct BlockQuantizedAttributes {
  std::optional<int64_t> block_size;  // 128 for Fp8Weight, 16 for Fp4Weight
  std::optional<int64_t> n, k;        // of packed weights
  std::string weights_layout;
};

/// Throws Error for an attribute of another type.
BlockQuantizedAttributes ReadBlockQuantizedAttributes(const Attributes& node);

/// Check the node and say what it means. `inputs` are the tensors by number; A is not looked at. Throw
/// Error.
MatMulNBitsNode InterpretFp8Weight(const BlockQuantizedAttributes& attributes,
                                   const std::vector<TensorView>& inputs, DType dtype);
MatMulNBitsNode InterpretFp4Weight(const BlockQuantizedAttributes& attributes,
                                   const std::vector<TensorView>& inputs, DType dtype);

}  // namespace qmoe_plugin::ort
