#include "ops/ort/qmoe_node.h"

#include "ops/error.h"
#include "ops/ort/packed_node.h"
#include "ops/ort/qmoe_activation.h"
#include "ops/ort/qmoe_formats.h"
#include "ops/ort/qmoe_layout.h"
#include "ops/ort/qmoe_scales.h"

namespace qmoe_plugin::ort {
namespace {

using Tensors = std::vector<TensorView>;

void RequireFlag(const char* attribute, int64_t value) {
  QMOE_REQUIRE(value == 0 || value == 1, attribute, " is ", value, "; it must be 0 or 1");
}

/// [E, N, ...] of a projection. Its scales say it whatever the layout of the weights, unless they
/// are those of squares; the weights are raw then, and begin with the same dimensions.
struct Rows {
  std::string name;  // "fc1_scales"
  const TensorView& tensor;
  bool is_weights;
};

Rows FindRows(const std::string& name, const Tensors& inputs, size_t weights,
              const ScalePlan& plan) {
  if (!plan.format->square_blocks) return {name + "_scales", inputs[weights + 1], false};
  return {name + "_experts_weights", inputs[weights], true};
}

MoeSizes FindSizes(const Tensors& inputs, const ScalePlans& plans, int64_t rows_per_unit) {
  const Rows fc1 = FindRows("fc1", inputs, kFc1Weights, plans.fc1);
  const Rows fc2 = FindRows("fc2", inputs, kFc2Weights, plans.fc2);
  for (const Rows& rows : {fc1, fc2}) {
    const TensorView& tensor = rows.tensor;
    QMOE_REQUIRE(!rows.is_weights || tensor.shape.size() == 3, rows.name, " is ", tensor.Describe(),
                 "; weights in square blocks must be [E, N, K]");
    for (const int64_t dim : tensor.shape)
      QMOE_REQUIRE(dim > 0, rows.name, " is ", tensor.Describe(), "; no dimension may be 0");
  }
  QMOE_REQUIRE(fc1.tensor.shape[1] % rows_per_unit == 0, fc1.name, " is ", fc1.tensor.Describe(),
               "; gates and ups together must be an even number of rows");
  return {fc1.tensor.shape[0], fc2.tensor.shape[1], fc1.tensor.shape[1] / rows_per_unit};
}

void CheckSizes(const MoeSizes& sizes, const ScalePlans& plans) {
  const auto check = [](const char* name, int64_t size, const ScalePlan& plan) {
    QMOE_REQUIRE(size % 8 == 0 && size % plan.unit() == 0, name, " ", size,
                 " must be a multiple of ", plan.unit() == 8 ? "" : "block_size ", plan.unit());
  };
  check("hidden_size", sizes.hidden, plans.fc1);
  check("inter_size", sizes.inter, plans.fc2);
}

/// The numbers of a projection's inputs beside weights, scales and bias, which follow each other; 0
/// = it has none.
struct OtherInputs {
  size_t zero_points, global_scale, codebook;
};
constexpr OtherInputs kFc1Others{kFc1ZeroPoints, kFc1GlobalScale, kFc1Codebook};
constexpr OtherInputs kFc2Others{kFc2ZeroPoints, kFc2GlobalScale, kFc2Codebook};

Projection MakeProjection(const char* name, const Tensors& inputs, const MoeSizes& sizes,
                          const Matrix& m, const ScalePlan& plan, StoredLayout layout,
                          const OtherInputs& others) {
  Projection p;
  p.name = name;
  p.format = m.format;
  p.experts = sizes.experts;
  p.n = m.n;
  p.k = m.k;
  p.block_size = plan.block_size;
  p.scale_rows = plan.scale_rows;
  p.layout = layout;
  p.codes = inputs[m.input];
  p.scales = inputs[m.input + 1];
  p.scales_are_e8m0 = m.format->scales == ScaleKind::kE8M0;
  p.bias = inputs[m.input + 2];
  p.zero_points = inputs[others.zero_points];
  if (others.global_scale) p.global_scale = inputs[others.global_scale];
  p.codebook = inputs[others.codebook];
  return p;
}

/// Weights as a model stores them, in one of the layouts of qmoe_layout.h.
MoeSizes TakeStored(const QMoeAttributes& a, const Tensors& inputs, const QMoeFormats& formats,
                    const ScalePlans& scales, const ActivationPlan& activation, QMoeNode& node) {
  const MoeSizes sizes = FindSizes(inputs, scales, activation.rows_per_unit);
  const bool has_fc3 = inputs[kFc3Weights].present;
  const Matrix fc1{kFc1Weights, activation.rows_per_unit * sizes.inter, sizes.hidden,
                   formats.fc1.format};
  const Matrix fc2{kFc2Weights, sizes.hidden, sizes.inter, formats.fc2.format};
  const Matrix fc3{kFc3Weights, sizes.inter, sizes.hidden, formats.fc1.format};
  std::vector<Matrix> matrices{fc1, fc2};
  if (has_fc3) matrices.push_back(fc3);
  const LayoutDecision decision = DecideLayout(a, formats, inputs, sizes.experts, matrices);
  node.warning = decision.warning;
  const auto make = [&](const char* name, const Matrix& m, const ScalePlan& plan,
                        const OtherInputs& others) {
    return MakeProjection(name, inputs, sizes, m, plan, decision.layout, others);
  };
  node.weights.fc1 = make("fc1", fc1, scales.fc1, kFc1Others);
  node.weights.fc1_order = activation.order;
  node.weights.fc2 = make("fc2", fc2, scales.fc2, kFc2Others);
  if (has_fc3) node.weights.fc3 = make("fc3", fc3, scales.fc1, {kFc3ZeroPoints, 0, kFc1Codebook});
  return sizes;
}

/// Weights that were packed before. MakeQMoe checks that they are of the same sizes.
MoeSizes TakePacked(const QMoeAttributes& a, const Tensors& inputs, const ScalePlans& scales,
                    MoeWeights& weights) {
  QMOE_REQUIRE(a.weights_prepacked == -1,
               "weights_layout is \"packed\", but weights_prepacked=", a.weights_prepacked,
               " is given too; leave it out");
  QMOE_REQUIRE(!inputs[kFc3Weights].present,
               "weights_layout is \"packed\", so that fc1 has fc3 in it; leave fc3 out");
  const auto take = [&](const char* name, size_t input, const ScalePlan& plan,
                        const OtherInputs& others) {
    Projection p = PackedProjection(name, inputs[input], *plan.format, plan.block_size);
    p.scales = inputs[input + 1];  // this and the following must be left out
    p.bias = inputs[input + 2];
    p.zero_points = inputs[others.zero_points];
    p.global_scale = inputs[others.global_scale];
    p.codebook = inputs[others.codebook];
    return p;
  };
  weights.fc1 = take("fc1", kFc1Weights, scales.fc1, kFc1Others);
  weights.fc2 = take("fc2", kFc2Weights, scales.fc2, kFc2Others);
  return {weights.fc1.experts, weights.fc1.k, weights.fc2.k};
}

}  // namespace

QMoeAttributes ReadMoEAttributes(const Attributes& node) {
  QMoeAttributes a;
  a.activation_alpha = node.Float("activation_alpha", a.activation_alpha);
  a.activation_beta = node.Float("activation_beta", a.activation_beta);
  a.activation_type = node.String("activation_type", a.activation_type);
  a.k = node.Int("k", a.k);
  a.normalize_routing_weights = node.Int("normalize_routing_weights", a.normalize_routing_weights);
  a.num_shared_experts = node.Int("num_shared_experts", a.num_shared_experts);
  a.swiglu_fusion = node.Int("swiglu_fusion", a.swiglu_fusion);
  a.swiglu_limit = node.FindFloat("swiglu_limit");
  a.swiglu_limit_after_activation =
      node.Int("swiglu_limit_after_activation", a.swiglu_limit_after_activation);
  a.use_sparse_mixer = node.Int("use_sparse_mixer", a.use_sparse_mixer);
  a.weights_layout = node.String("weights_layout", a.weights_layout);
  return a;
}

QMoeAttributes ReadQMoeAttributes(const Attributes& node) {
  QMoeAttributes a = ReadMoEAttributes(node);
  a.accuracy_level = node.Int("accuracy_level", a.accuracy_level);
  a.block_size = node.FindInt("block_size");
  a.expert_weight_bits = node.FindInt("expert_weight_bits");
  a.fc1_expert_weight_bits = node.FindInt("fc1_expert_weight_bits");
  a.fc2_expert_weight_bits = node.FindInt("fc2_expert_weight_bits");
  a.fc3_expert_weight_bits = node.FindInt("fc3_expert_weight_bits");
  a.fc1_format = node.String("fc1_format", a.fc1_format);
  a.fc2_format = node.String("fc2_format", a.fc2_format);
  a.quant_type = node.String("quant_type", a.quant_type);
  a.weights_prepacked = node.Int("weights_prepacked", a.weights_prepacked);
  return a;
}

void CheckRouting(const QMoeAttributes& a) {
  RequireFlag("normalize_routing_weights", a.normalize_routing_weights);
  RequireFlag("use_sparse_mixer", a.use_sparse_mixer);
}

void SetConfig(const QMoeAttributes& a, const ActivationPlan& activation, const MoeSizes& sizes,
               DType dtype, MoeConfig& config) {
  config.dtype = dtype;
  config.hidden_size = sizes.hidden;
  config.inter_size = sizes.inter;
  config.experts = sizes.experts;
  // MakeQMoe checks the sum of these two, which must not overflow.
  QMOE_REQUIRE(a.num_shared_experts >= 0 && a.num_shared_experts < sizes.experts,
               "num_shared_experts is ", a.num_shared_experts, "; it must be from 0 to ",
               sizes.experts - 1, ", as one of the ", sizes.experts,
               " experts at least must be routed");
  const int64_t routed = sizes.experts - a.num_shared_experts;
  QMOE_REQUIRE(a.k >= 1 && a.k <= routed, "k is ", a.k, "; it must be from 1 to the number of ",
               a.num_shared_experts ? "routed " : "", "experts, ", routed);
  config.shared_experts = a.num_shared_experts;
  config.topk = a.k + a.num_shared_experts;
  config.normalize_routing_weights = a.normalize_routing_weights == 1;
  config.use_sparse_mixer = a.use_sparse_mixer == 1;
  config.activation = activation.params;
}

QMoeNode InterpretQMoe(const QMoeAttributes& a, const Tensors& inputs, DType dtype) {
  CheckRouting(a);
  QMOE_REQUIRE(a.accuracy_level >= 0 && a.accuracy_level <= 4, "accuracy_level is ",
               a.accuracy_level, "; allowed are 0 to 4");
  const bool has_fc3 = inputs[kFc3Weights].present;
  QMOE_REQUIRE(has_fc3 || !(inputs[kFc3Scales].present || inputs[kFc3Bias].present ||
                            inputs[kFc3ZeroPoints].present),
               "fc3 scales, bias or zero points are given without fc3_experts_weights; give all of "
               "fc3 or none");
  const ActivationPlan activation = PlanActivation(a, has_fc3);
  const QMoeFormats formats = FindFormats(a);
  const ScalePlans scales = PlanScales(a, formats, inputs, has_fc3);
  QMoeNode node;
  const MoeSizes sizes = a.weights_layout == kPackedLayout
                             ? TakePacked(a, inputs, scales, node.weights)
                             : TakeStored(a, inputs, formats, scales, activation, node);
  CheckSizes(sizes, scales);
  SetConfig(a, activation, sizes, dtype, node.config);
  node.config.accuracy_level = AccuracyLevel(a.accuracy_level);
  PlanActivationQuant(a, inputs, node.config);
  return node;
}

}  // namespace qmoe_plugin::ort
