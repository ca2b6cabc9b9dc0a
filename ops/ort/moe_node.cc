#include "ops/ort/moe_node.h"

#include "ops/error.h"
#include "ops/ort/packed_node.h"
#include "ops/ort/qmoe_activation.h"

namespace qmoe_plugin::ort {
namespace {

/// Weights and, next to them in the list of inputs, the bias.
Projection MakeProjection(const char* name, const std::vector<TensorView>& inputs,
                          MoEInput weights) {
  const TensorView& codes = inputs[size_t(weights)];
  const std::string input = Concat("input ", size_t(weights), " (", name, "_experts_weights)");
  QMOE_REQUIRE(
      IsFloat(codes.dtype) && codes.shape.size() == 3, input, " is ", codes.Describe(),
      "; it must be float32, float16 or bfloat16 [E, N, K] (quantised weights are for QMoE)");
  QMOE_REQUIRE(codes.elements() > 0, input, " is ", codes.Describe(), "; no dimension may be 0");
  Projection p;
  p.name = name;
  p.format = &GetFormat(Name(codes.dtype));  // these formats are called like the types
  p.experts = codes.shape[0];
  p.n = codes.shape[1];
  p.k = codes.shape[2];
  p.codes = codes;
  p.bias = inputs[size_t(weights) + 1];
  return p;
}

/// Weights that were packed before, and a bias that must be left out.
Projection TakePacked(const char* name, const std::vector<TensorView>& inputs, MoEInput weights) {
  Projection p = PackedPlainProjection(name, inputs[size_t(weights)]);
  p.bias = inputs[size_t(weights) + 1];
  return p;
}

}  // namespace

QMoeNode InterpretMoE(const QMoeAttributes& a, const std::vector<TensorView>& inputs, DType dtype) {
  CheckRouting(a);
  const bool has_fc3 = inputs[size_t(MoEInput::kFc3Weights)].present;
  QMOE_REQUIRE(has_fc3 || !inputs[size_t(MoEInput::kFc3Bias)].present,
               "a bias of fc3 is given without fc3_experts_weights; give both or none");
  const ActivationPlan activation = PlanActivation(a, has_fc3);
  const bool packed = IsPacked(a.weights_layout, "The weights of a MoE have no other layouts");
  QMOE_REQUIRE(!packed || !has_fc3,
               "weights_layout is \"packed\", so that fc1 has fc3 in it; leave fc3 out");
  const auto take = packed ? TakePacked : MakeProjection;
  QMoeNode node;
  node.weights.fc1 = take("fc1", inputs, MoEInput::kFc1Weights);
  node.weights.fc1_order = packed ? RowOrder::kAsStored : activation.order;
  node.weights.fc2 = take("fc2", inputs, MoEInput::kFc2Weights);
  if (has_fc3) node.weights.fc3 = MakeProjection("fc3", inputs, MoEInput::kFc3Weights);
  // What fc1 says; MakeQMoe checks the others.
  const Projection& fc1 = node.weights.fc1;
  QMOE_REQUIRE(fc1.n % activation.rows_per_unit == 0, "fc1_experts_weights is ",
               (packed ? fc1.packed : fc1.codes).Describe(),
               "; gates and ups together must be an even number of rows, not ", fc1.n);
  SetConfig(a, activation, {fc1.experts, fc1.k, fc1.n / activation.rows_per_unit}, dtype,
            node.config);
  return node;
}

}  // namespace qmoe_plugin::ort
