// What a MoE node of a model means: QMoE with float weights, which are a format like any other
// (ops/formats/float16.h and its like). Knows no ONNX Runtime.
//
// E experts, H hidden_size, I inter_size; F = 2 when fc1 holds gates and ups together, else 1.
//   fc1 [E, F * I, H], fc2 [E, H, I], fc3 [E, I, H] (ups, when apart from fc1), biases [E, F * I],
//   [E, H], [E, I]. Each may have any float type, whatever that of the input; fc3 that of fc1.
// Weights packed before: ops/ort/packed_node.h.
#pragma once

#include <vector>

#include "ops/ort/qmoe_node.h"

namespace qmoe_plugin::ort {

/// The inputs of MoE by number; the names are those of com.microsoft.
enum class MoEInput : size_t {
  kInput,
  kRouterProbs,
  kFc1Weights,
  kFc1Bias,
  kFc2Weights,
  kFc2Bias,
  kFc3Weights,
  kFc3Bias,
  kCount,
};

/// Checks the node and says what it means. Of the attributes those of ReadMoEAttributes count; `inputs` are
/// the tensors by MoEInput, of which those that vary from run to run are not looked at. Throws Error.
QMoeNode InterpretMoE(const QMoeAttributes& attributes, const std::vector<TensorView>& inputs,
                      DType dtype);

}  // namespace qmoe_plugin::ort
