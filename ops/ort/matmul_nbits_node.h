// What a MatMulNBits node of a model means: attributes and tensors in, MatMulConfig and Projection
// out. Knows no ONNX Runtime.
//
// B is of the integer format that `bits` says, or of the one that weight_format names (an attribute
// of ours: a registered format). Scales are then of that format's types (ops/formats/format.h), with
// a codebook [16] or a global scale [1] where it has one: inputs 6 and 7, which are ours too. Formats
// with square blocks may have block_size 0: one block is the row (G = 1), and there is only a global
// scale.
//
// G = ceil(K / block_size). Shapes: B [N, G, block_size * bits / 8], scales [N, G] or [N * G], zero
// points packed [N, ceil(G * bits / 8)] or one value a block [N, G] (both flat, too), scales
// of square blocks [ceil(N / block_size), G], g_idx [K] or
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

/// The inputs of MatMulNBits by number; the names are those of com.microsoft, but for
/// the last two.
enum MatMulNBitsInput : size_t {
  kA,
  kB,
  kScales,
  kZeroPoints,
  kGroupIndex,
  kBias,
  kCodebook,
  kGlobalScale,
  kMatMulNBitsInputs
};

/// The attributes with com.microsoft's defaults; empty = not given. weights_layout is ours.
struct MatMulNBitsAttributes {
  std::optional<int64_t> k, n, block_size;  // required
  std::optional<int64_t> bits;              // 4, or what weight_format has
  std::string weight_format;
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
