#include "ops/ort/qmoe_node.h"

#include "ops/error.h"
#include "ops/ort/packed_node.h"
#include "ops/ort/qmoe_activation.h"
#include "ops/ort/qmoe_layout.h"
#include "ops/ort/qmoe_scales.h"

namespace qmoe_plugin::ort {
namespace {

using Tensors = std::vector<TensorView>;

void RequireFlag(const char* attribute, int64_t value) {
  QMOE_REQUIRE(value == 0 || value == 1, attribute, " is ", value, "; it must be 0 or 1");
}

struct Sizes {
  int64_t experts, hidden, inter;  // E, H, I
};

/// Which dimension is which. Scales of rows say it whatever the layout of the weights, [E, F * I,
/// ...] for fc1 and [E, H, ...] for fc2; where there are none, the weights are raw and begin with
/// the same dimensions.
Sizes FindSizes(const Tensors& inputs, const ScalePlan& scales, int64_t rows_per_unit) {
  const bool by_scales = !scales.type->square_blocks;
  const TensorView& fc1 = inputs[by_scales ? kFc1Scales : kFc1Weights];
  const TensorView& fc2 = inputs[by_scales ? kFc2Scales : kFc2Weights];
  const char* what = by_scales ? "scales" : "experts_weights";
  for (const TensorView* tensor : {&fc1, &fc2}) {
    QMOE_REQUIRE(by_scales || tensor->shape.size() == 3, "fc1_experts_weights is ", fc1.Describe(),
                 " and fc2_experts_weights is ", fc2.Describe(), "; weights of quant_type \"",
                 scales.type->name, "\" must be [E, N, K]");
    for (const int64_t dim : tensor->shape)
      QMOE_REQUIRE(dim > 0, "fc1_", what, " is ", fc1.Describe(), " and fc2_", what, " is ",
                   fc2.Describe(), "; no dimension may be 0");
  }
  QMOE_REQUIRE(fc1.shape[1] % rows_per_unit == 0, "fc1_", what, " is ", fc1.Describe(),
               "; gates and ups together must be an even number of rows");
  return {fc1.shape[0], fc2.shape[1], fc1.shape[1] / rows_per_unit};
}

void CheckSizes(const Sizes& sizes, const ScalePlan& scales) {
  const bool partial_blocks = scales.type->square_blocks || scales.block_size == 0;
  const int64_t unit = partial_blocks ? 8 : scales.block_size;
  QMOE_REQUIRE(sizes.hidden % unit == 0 && sizes.inter % unit == 0, "hidden_size ", sizes.hidden,
               " and inter_size ", sizes.inter, " must be multiples of ",
               partial_blocks ? "" : "block_size ", unit);
}

/// The formats of fc1, fc2 and fc3.
struct Formats {
  const Format *fc1, *fc2, *fc3;
};

Formats FindFormats(const QMoeAttributes& a, const ScalePlan& scales) {
  const auto find = [&](const char* attribute, std::optional<int64_t> own) {
    return &WeightFormat(scales, own ? attribute : "expert_weight_bits",
                         own ? own : a.expert_weight_bits);
  };
  WeightFormat(scales, "expert_weight_bits", a.expert_weight_bits);
  const Format* fc1 = find("fc1_expert_weight_bits", a.fc1_expert_weight_bits);
  const Format* fc3 =
      find("fc3_expert_weight_bits",
           a.fc3_expert_weight_bits ? a.fc3_expert_weight_bits : a.fc1_expert_weight_bits);
  QMOE_REQUIRE(fc3 == fc1, "fc3_expert_weight_bits is ", fc3->bits, " and fc1 has ", fc1->bits,
               " bits; gates and ups must have the same");
  return {fc1, find("fc2_expert_weight_bits", a.fc2_expert_weight_bits), fc3};
}

/// `global_scale` is 0 for a projection that has no input for one.
Projection MakeProjection(const char* name, const Tensors& inputs, const Sizes& sizes,
                          const Matrix& m, const ScalePlan& scales, StoredLayout layout,
                          QMoeInput zero_points, size_t global_scale) {
  Projection p;
  p.name = name;
  p.format = m.format;
  p.experts = sizes.experts;
  p.n = m.n;
  p.k = m.k;
  p.block_size = scales.block_size;
  p.scale_rows = scales.scale_rows;
  p.layout = layout;
  p.codes = inputs[m.input];
  // Scales, bias and weights follow each other in the list of inputs.
  p.scales = inputs[m.input + 1];
  p.scales_are_e8m0 = scales.type->scales == DType::kFloat8E8M0;
  p.bias = inputs[m.input + 2];
  p.zero_points = inputs[zero_points];
  if (global_scale) p.global_scale = inputs[global_scale];
  return p;
}

/// Weights as a model stores them, in one of the layouts of qmoe_layout.h.
Sizes TakeStored(const QMoeAttributes& a, const Tensors& inputs, const ScalePlan& scales,
                 const Formats& formats, const ActivationPlan& activation, QMoeNode& node) {
  const Sizes sizes = FindSizes(inputs, scales, activation.rows_per_unit);
  const bool has_fc3 = inputs[kFc3Weights].present;
  const Matrix fc1{kFc1Weights, activation.rows_per_unit * sizes.inter, sizes.hidden, formats.fc1};
  const Matrix fc2{kFc2Weights, sizes.hidden, sizes.inter, formats.fc2};
  const Matrix fc3{kFc3Weights, sizes.inter, sizes.hidden, formats.fc3};
  std::vector<Matrix> matrices{fc1, fc2};
  if (has_fc3) matrices.push_back(fc3);
  const LayoutDecision decision = DecideLayout(a, *scales.type, inputs, sizes.experts, matrices);
  node.warning = decision.warning;
  const auto make = [&](const char* name, const Matrix& m, QMoeInput zero_points,
                        size_t global_scale) {
    return MakeProjection(name, inputs, sizes, m, scales, decision.layout, zero_points,
                          global_scale);
  };
  node.weights.fc1 = make("fc1", fc1, kFc1ZeroPoints, kFc1GlobalScale);
  node.weights.fc1_order = activation.order;
  node.weights.fc2 = make("fc2", fc2, kFc2ZeroPoints, kFc2GlobalScale);
  if (has_fc3) node.weights.fc3 = make("fc3", fc3, kFc3ZeroPoints, 0);
  return sizes;
}

/// Weights that were packed before. MakeQMoe checks that they are of the same sizes.
Sizes TakePacked(const QMoeAttributes& a, const Tensors& inputs, const ScalePlan& scales,
                 const Formats& formats, MoeWeights& weights) {
  QMOE_REQUIRE(a.weights_prepacked == -1,
               "weights_layout is \"packed\", but weights_prepacked=", a.weights_prepacked,
               " is given too; leave it out");
  QMOE_REQUIRE(!inputs[kFc3Weights].present,
               "weights_layout is \"packed\", so that fc1 has fc3 in it; leave fc3 out");
  const auto take = [&](const char* name, size_t input, const Format& format, size_t zero_points,
                        size_t global_scale) {
    Projection p = PackedProjection(name, inputs[input], format, scales.block_size);
    p.scales = inputs[input + 1];  // this and the following must be left out
    p.bias = inputs[input + 2];
    p.zero_points = inputs[zero_points];
    p.global_scale = inputs[global_scale];
    return p;
  };
  weights.fc1 = take("fc1", kFc1Weights, *formats.fc1, kFc1ZeroPoints, kFc1GlobalScale);
  weights.fc2 = take("fc2", kFc2Weights, *formats.fc2, kFc2ZeroPoints, kFc2GlobalScale);
  return {weights.fc1.experts, weights.fc1.k, weights.fc2.k};
}

}  // namespace

QMoeAttributes ReadQMoeAttributes(const Attributes& node) {
  QMoeAttributes a;
  a.accuracy_level = node.Int("accuracy_level", a.accuracy_level);
  a.activation_alpha = node.Float("activation_alpha", a.activation_alpha);
  a.activation_beta = node.Float("activation_beta", a.activation_beta);
  a.activation_type = node.String("activation_type", a.activation_type);
  a.block_size = node.FindInt("block_size");
  a.expert_weight_bits = node.FindInt("expert_weight_bits");
  a.fc1_expert_weight_bits = node.FindInt("fc1_expert_weight_bits");
  a.fc2_expert_weight_bits = node.FindInt("fc2_expert_weight_bits");
  a.fc3_expert_weight_bits = node.FindInt("fc3_expert_weight_bits");
  a.k = node.Int("k", a.k);
  a.normalize_routing_weights = node.Int("normalize_routing_weights", a.normalize_routing_weights);
  a.quant_type = node.String("quant_type", a.quant_type);
  a.swiglu_fusion = node.Int("swiglu_fusion", a.swiglu_fusion);
  a.swiglu_limit = node.FindFloat("swiglu_limit");
  a.use_sparse_mixer = node.Int("use_sparse_mixer", a.use_sparse_mixer);
  a.weights_layout = node.String("weights_layout", a.weights_layout);
  a.weights_prepacked = node.Int("weights_prepacked", a.weights_prepacked);
  return a;
}

QMoeNode InterpretQMoe(const QMoeAttributes& a, const Tensors& inputs, DType dtype) {
  RequireFlag("normalize_routing_weights", a.normalize_routing_weights);
  RequireFlag("use_sparse_mixer", a.use_sparse_mixer);
  QMOE_REQUIRE(a.accuracy_level >= 0 && a.accuracy_level <= 4, "accuracy_level is ",
               a.accuracy_level, "; allowed are 0 to 4");
  const bool has_fc3 = inputs[kFc3Weights].present;
  QMOE_REQUIRE(has_fc3 || !(inputs[kFc3Scales].present || inputs[kFc3Bias].present ||
                            inputs[kFc3ZeroPoints].present),
               "fc3 scales, bias or zero points are given without fc3_experts_weights; give all of "
               "fc3 or none");
  const ActivationPlan activation = PlanActivation(a, has_fc3);
  const ScalePlan scales = PlanScales(a, inputs, has_fc3);
  const Formats formats = FindFormats(a, scales);
  QMoeNode node;
  const Sizes sizes = a.weights_layout == kPackedLayout
                          ? TakePacked(a, inputs, scales, formats, node.weights)
                          : TakeStored(a, inputs, scales, formats, activation, node);
  CheckSizes(sizes, scales);
  node.config.dtype = dtype;
  node.config.hidden_size = sizes.hidden;
  node.config.inter_size = sizes.inter;
  node.config.experts = sizes.experts;
  node.config.topk = a.k;
  node.config.normalize_routing_weights = a.normalize_routing_weights == 1;
  node.config.use_sparse_mixer = a.use_sparse_mixer == 1;
  node.config.activation = activation.params;
  node.config.accuracy_level = AccuracyLevel(a.accuracy_level);
  PlanActivationQuant(scales, inputs, node.config);
  return node;
}

}  // namespace qmoe_plugin::ort
