// What a QMoE node of a model means: attributes and tensors in, MoeConfig and MoeWeights out. Knows
// no ONNX Runtime.
//
// E experts, H hidden_size, I inter_size; F = 2 when fc1 holds gates and ups together, else 1.
// Shapes of raw weights:
//   fc1 [E, F * I, H * bits / 8], fc2 [E, H, I * bits / 8], fc3 [E, I, H * bits / 8] (ups, when
//   apart from fc1).
// Formats: ops/ort/qmoe_formats.h. Other layouts: ops/ort/qmoe_layout.h, weights packed before:
// ops/ort/packed_node.h. Scales: ops/ort/qmoe_scales.h. Activations: ops/ort/qmoe_activation.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/ort/attributes.h"
#include "ops/problem.h"

namespace qmoe_plugin::ort {

/// The inputs of QMoE by number; the names are those of com.microsoft, but for the codebooks, which
/// are ours.
enum QMoeInput : size_t {
  kInput,
  kRouterProbs,
  kFc1Weights,
  kFc1Scales,
  kFc1Bias,
  kFc2Weights,
  kFc2Scales,
  kFc2Bias,
  kFc3Weights,
  kFc3Scales,
  kFc3Bias,
  kFc1ZeroPoints,
  kFc2ZeroPoints,
  kFc3ZeroPoints,
  kRouterWeights,
  kFc1GlobalScale,
  kFc2GlobalScale,
  kFc1ActScale,
  kFc2ActScale,
  kFc1ActBlockScale,
  kFc2ActBlockScale,
  kFc1Codebook,
  kFc2Codebook,
  kQMoeInputs,
};

/// The attributes with com.microsoft's defaults; empty = not given. fc1_format, fc2_format and
/// weights_layout are ours, and num_shared_experts is in no release of onnxruntime yet.
struct QMoeAttributes {
  int64_t accuracy_level = 0;
  float activation_alpha = 1.0f;
  float activation_beta = 0.0f;
  std::string activation_type = "relu";
  std::optional<int64_t> block_size;
  std::optional<int64_t> expert_weight_bits;  // 4 with quant_type "int", else what the format has
  std::optional<int64_t> fc1_expert_weight_bits, fc2_expert_weight_bits, fc3_expert_weight_bits;
  std::string fc1_format, fc2_format;
  int64_t k = 1;
  int64_t normalize_routing_weights = 0;
  int64_t num_shared_experts = 0;
  std::string quant_type = "int";
  int64_t swiglu_fusion = 0;
  std::optional<float> swiglu_limit;
  int64_t swiglu_limit_after_activation = 0;
  int64_t use_sparse_mixer = 0;
  std::string weights_layout;
  int64_t weights_prepacked = -1;
};

/// Throw Error for an attribute of another type. The first reads those that MoE has, too.
QMoeAttributes ReadMoEAttributes(const Attributes& node);
QMoeAttributes ReadQMoeAttributes(const Attributes& node);

struct QMoeNode {
  MoeConfig config;
  MoeWeights weights;
  std::string warning;  // something the user should know; empty = nothing
};

struct ActivationPlan;  // ops/ort/qmoe_activation.h

struct MoeSizes {
  int64_t experts, hidden, inter;  // E, H, I
};

// What QMoE and MoE share. Both throw Error: the first for flags of routing that are none, the second
// for numbers of experts.
void CheckRouting(const QMoeAttributes& attributes);
void SetConfig(const QMoeAttributes& attributes, const ActivationPlan& activation,
               const MoeSizes& sizes, DType dtype, MoeConfig& config);

/// Checks the node and says what it means. `inputs` are the tensors by QMoeInput (kQMoeInputs of
/// them); those that vary from run to run are not looked at. Throws Error.
QMoeNode InterpretQMoe(const QMoeAttributes& attributes, const std::vector<TensorView>& inputs,
                       DType dtype);

}  // namespace qmoe_plugin::ort
