#include "ops/ort/qmoe_activation.h"

#include <cmath>
#include <limits>

#include "ops/error.h"

namespace qmoe_plugin::ort {
namespace {

/// What activation_type names, without its parameters.
Activation ParseActivation(const std::string& type) {
  if (type == "identity") return Activation::kIdentity;
  if (type == "relu") return Activation::kRelu;
  if (type == "gelu") return Activation::kGelu;
  if (type == "silu") return Activation::kSilu;
  if (type == "swiglu") return Activation::kSwiglu;
  if (type == "geglu") return Activation::kGeglu;
  FailInvalid("activation_type is \"", type,
              "\"; allowed are relu, gelu, silu, identity, swiglu and geglu");
}

ActivationParams PlanGated(const QMoeAttributes& a, Activation type) {
  if (type == Activation::kGeglu) {
    if (a.swiglu_limit && std::isfinite(*a.swiglu_limit)) {
      FailUnsupported("swiglu_limit is ", *a.swiglu_limit,
                      " with activation_type \"geglu\", which has no limit; remove the attribute");
    }
    return {.type = type};
  }
  ActivationParams params{.type = type, .alpha = a.activation_alpha, .beta = a.activation_beta};
  QMOE_REQUIRE(std::isfinite(params.alpha) && std::isfinite(params.beta), "activation_alpha is ",
               params.alpha, " and activation_beta ", params.beta, "; both must be finite");
  const float limit = a.swiglu_limit.value_or(std::numeric_limits<float>::infinity());
  QMOE_REQUIRE(limit > 0, "swiglu_limit is ", limit,
               "; it must be positive (leave it out for no limit)");
  params.up_limit = limit;
  (a.swiglu_limit_after_activation ? params.activated_limit : params.gate_limit) = limit;
  return params;
}

/// fc3 beside an activation that is not gated by itself: act(fc1) * fc3.
ActivationParams PlanClassicGating(const std::string& type) {
  // silu(gate) * up is swiglu with alpha 1, beta 0 and no limit.
  if (type == "silu") return {.type = Activation::kSwiglu};
  if (type == "gelu") {
    FailUnsupported(
        "activation_type is \"gelu\" (erf) with fc3, and there is no gated form of it; if the "
        "model was trained with the tanh approximation, write activation_type=\"geglu\"");
  }
  FailUnsupported(
      "activation_type is \"", type,
      "\" with fc3, and there is no gated form of it; fc3 goes with silu, swiglu or geglu");
}

}  // namespace

ActivationPlan PlanActivation(const QMoeAttributes& a, bool has_fc3) {
  const Activation type = ParseActivation(a.activation_type);
  QMOE_REQUIRE(a.swiglu_fusion >= 0 && a.swiglu_fusion <= 2, "swiglu_fusion is ", a.swiglu_fusion,
               "; allowed are 0 (fc1 and fc3), 1 (interleaved) and 2 (gates, then ups)");
  const int64_t after = a.swiglu_limit_after_activation;
  QMOE_REQUIRE(after == 0 || after == 1, "swiglu_limit_after_activation is ", after,
               "; it must be 0 or 1");
  QMOE_REQUIRE(after == 0 || type == Activation::kSwiglu,
               "swiglu_limit_after_activation is 1 with activation_type \"", a.activation_type,
               "\"; only swiglu has a limit, so it must be 0");
  QMOE_REQUIRE(a.swiglu_fusion == 0 || IsGated(type), "swiglu_fusion is ", a.swiglu_fusion,
               " with activation_type \"", a.activation_type,
               "\"; only swiglu and geglu can be fused, so it must be 0");
  QMOE_REQUIRE(a.swiglu_fusion == 0 || !has_fc3, "swiglu_fusion is ", a.swiglu_fusion,
               ", which says that fc1 holds gates and ups, but fc3_experts_weights is given too; "
               "leave fc3 out or set swiglu_fusion=0");
  if (has_fc3)
    return {IsGated(type) ? PlanGated(a, type) : PlanClassicGating(a.activation_type),
            RowOrder::kTwoMatrices, 1};
  if (!IsGated(type)) return {{.type = type}, RowOrder::kAsStored, 1};
  // swiglu_fusion=0 without fc3 is how old exports say interleaved.
  return {PlanGated(a, type), a.swiglu_fusion == 2 ? RowOrder::kHalves : RowOrder::kAsStored, 2};
}

}  // namespace qmoe_plugin::ort
