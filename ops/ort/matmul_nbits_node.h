// What a MatMulNBits node of a model means: attributes and tensors in, MatMulConfig and Projection
// out. Knows no ONNX Runtime.
//
// G = ceil(K / block_size). Shapes: B [N, G, block_size * bits / 8], scales [N, G] or [N * G], zero
// points packed [N, ceil(G * bits / 8)] or one value a block [N, G] (both flat, too), g_idx [K] or
// [G * block_size], bias [N]. weight_prepacked 1 and 2 permute the bytes of B and leave its shape.
// Weights packed before: ops/ort/packed_node.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/ort/attributes.h"
#include "ops/problem.h"

namespace qmoe_plugin::ort {

/// The inputs of MatMulNBits by number; the names are those of com.microsoft.
enum MatMulNBitsInput : size_t {
  kA,
  kB,
  kScales,
  kZeroPoints,
  kGroupIndex,
  kBias,
  kMatMulNBitsInputs
};

/// The attributes with com.microsoft's defaults; empty = not given. weights_layout is ours.
struct MatMulNBitsAttributes {
  std::optional<int64_t> k, n, block_size;  // required
  int64_t bits = 4;
  int64_t accuracy_level = 0;
  int64_t weight_prepacked = 0;
  std::string weights_layout;
};

/// Throws Error for an attribute of another type.
MatMulNBitsAttributes ReadMatMulNBitsAttributes(const Attributes& node);

struct MatMulNBitsNode {
  MatMulConfig config;
  Projection weights;
};

/// Checks the node and says what it means. `inputs` are the tensors by MatMulNBitsInput
/// (kMatMulNBitsInputs of them); A is not looked at. Throws Error.
MatMulNBitsNode InterpretMatMulNBits(const MatMulNBitsAttributes& attributes,
                                     const std::vector<TensorView>& inputs, DType dtype);

}  // namespace qmoe_plugin::ort
