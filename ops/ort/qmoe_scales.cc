#include "ops/ort/qmoe_scales.h"

#include "ops/error.h"
#include "ops/ort/packed_node.h"

namespace qmoe_plugin::ort {
namespace {

using Tensors = std::vector<TensorView>;

/// One projection's inputs; 0 = it has none for that.
struct Inputs {
  size_t scales, global_scale, codebook;
};
constexpr Inputs kFc1Inputs{kFc1Scales, kFc1GlobalScale, kFc1Codebook};
constexpr Inputs kFc2Inputs{kFc2Scales, kFc2GlobalScale, kFc2Codebook};

/// `needed_elsewhere`: the attribute says the blocks of another projection.
int64_t FindBlockSize(const FormatChoice& choice, std::optional<int64_t> given,
                      bool needed_elsewhere) {
  const Format& format = *choice.format;
  if (format.block_size) {
    QMOE_REQUIRE(needed_elsewhere || given.value_or(format.block_size) == format.block_size,
                 "block_size is ", *given, "; ", choice.says, " has blocks of ", format.block_size,
                 ", so leave it out");
    return format.block_size;
  }
  const int64_t block_size = given.value_or(0);
  QMOE_REQUIRE(
      block_size == 0 ||
          (block_size >= 16 && block_size <= 65536 && (block_size & (block_size - 1)) == 0),
      "block_size is ", block_size, "; it must be a power of two from 16 to 65536, or 0 for one ",
      format.square_blocks ? "factor an expert" : "scale a row");
  return block_size;
}

void CheckScales(const FormatChoice& choice, const ScalePlan& plan, size_t input,
                 const TensorView& scales) {
  const std::string subject = Concat("input ", input, " (scales)");
  if (!plan.has_scales) {
    QMOE_REQUIRE(!scales.present, subject, " is ", scales.Describe(), ", but ", choice.says,
                 " without block_size has a factor an expert (inputs 15 and 16) and no other "
                 "scales; leave it out, or set block_size");
    return;
  }
  QMOE_REQUIRE(scales.present, subject, " is missing; ", choice.says,
               " needs scales for every weight");
  CheckScaleType(choice, subject, scales);
  const size_t rank = scales.shape.size();
  QMOE_REQUIRE(rank == 2 || rank == 3, subject, " is ", scales.Describe(),
               "; it must be [E, N], or [E, N, K / block_size]");
  QMOE_REQUIRE(plan.block_size > 0 || rank == 2 || scales.shape[2] == 1, subject, " is ",
               scales.Describe(),
               ", several scales a row, but the node has no block_size; set the attribute to the "
               "number of weights that share a scale");
}

void CheckGlobalScale(const FormatChoice& choice, const ScalePlan& plan, size_t input,
                      const TensorView& scale) {
  const ScaleKind kind = choice.format->scales;
  const bool needed = NeedsGlobalScale(kind) || !plan.has_scales;
  QMOE_REQUIRE(needed || kind == ScaleKind::kAny || !scale.present, "input ", input,
               " (global scale) is ", scale.Describe(), ", but ", choice.says, " ",
               choice.format->square_blocks ? "with block_size has a scale a square block"
                                            : "has no global scales",
               "; leave it out");
  QMOE_REQUIRE(!needed || scale.present, "input ", input, " (global scale) is missing; ",
               choice.says,
               " needs one factor an expert, float32 [E]. Where there is nothing to scale, give "
               "ones");
}

ScalePlan PlanProjection(const FormatChoice& choice, std::optional<int64_t> block_size,
                         bool needed_elsewhere) {
  const Format& format = *choice.format;
  ScalePlan plan{.format = &format,
                 .block_size = FindBlockSize(choice, block_size, needed_elsewhere)};
  if (format.square_blocks) {
    plan.has_scales = plan.block_size > 0;
    plan.scale_rows = plan.has_scales ? plan.block_size : 1;
  }
  return plan;
}

void CheckProjection(const FormatChoice& choice, const ScalePlan& plan, const Tensors& tensors,
                     const Inputs& inputs) {
  CheckScales(choice, plan, inputs.scales, tensors[inputs.scales]);
  CheckGlobalScale(choice, plan, inputs.global_scale, tensors[inputs.global_scale]);
  const char* name = inputs.codebook == kFc1Codebook ? " (fc1_codebook)" : " (fc2_codebook)";
  CheckCodebook(choice, Concat("input ", inputs.codebook, name), tensors[inputs.codebook]);
}

/// E values, of one for all or of one an expert. MakeQMoe checks them.
std::vector<float> ReadActScales(size_t input, const TensorView& tensor, int64_t experts) {
  QMOE_REQUIRE(tensor.dtype == DType::kFloat32 && tensor.shape.size() == 1 &&
                   (tensor.shape[0] == 1 || tensor.shape[0] == experts),
               "input ", input, " (activation scale) is ", tensor.Describe(),
               "; it must be float32[1] or float32[", experts, "], one an expert");
  const float* values = static_cast<const float*>(tensor.data);
  if (tensor.shape[0] == 1) return std::vector<float>(size_t(experts), values[0]);
  return {values, values + tensor.shape[0]};
}

}  // namespace

ScalePlans PlanScales(const QMoeAttributes& a, const QMoeFormats& formats, const Tensors& inputs,
                      bool has_fc3) {
  const FormatChoice &fc1 = formats.fc1, &fc2 = formats.fc2;
  const ScalePlans plans{PlanProjection(fc1, a.block_size, fc2.format->block_size == 0),
                         PlanProjection(fc2, a.block_size, fc1.format->block_size == 0)};
  if (a.weights_layout == kPackedLayout) return plans;  // they are in the weights
  const ScaleKind kind = fc1.format->scales;
  QMOE_REQUIRE(!has_fc3 || !(NeedsGlobalScale(kind) || !plans.fc1.has_scales),
               "fc3_experts_weights is given, but ", fc1.says,
               fc1.format->square_blocks ? " without block_size" : "",
               " needs a global scale for each projection, and there is no input for that of fc3; "
               "store gates and ups together in fc1 (swiglu_fusion 1 or 2)");
  QMOE_REQUIRE(!has_fc3 || kind != ScaleKind::kAny || !inputs[kFc1GlobalScale].present,
               "fc3_experts_weights and input 15 (global scale) are given, but there is no input "
               "for the global scale of fc3; put the factor into the scales");
  CheckProjection(fc1, plans.fc1, inputs, kFc1Inputs);
  CheckProjection(fc2, plans.fc2, inputs, kFc2Inputs);
  if (has_fc3) CheckScales(fc1, plans.fc1, kFc3Scales, inputs[kFc3Scales]);
  return plans;
}

void PlanActivationQuant(const QMoeAttributes& a, const Tensors& inputs, MoeConfig& config) {
  const bool quantizes = a.quant_type == "wfp4afp8";
  for (size_t i = kFc1ActScale; i <= kFc2ActBlockScale; ++i) {
    QMOE_REQUIRE(quantizes || !inputs[i].present, "input ", i, " is given (", inputs[i].Describe(),
                 "), but inputs 17 to 20, scales of activations, belong to quant_type "
                 "\"wfp4afp8\"; leave it out");
    QMOE_REQUIRE(i < kFc1ActBlockScale || !inputs[i].present, "input ", i,
                 " (block scales of "
                 "activations) is given (",
                 inputs[i].Describe(),
                 "); activations differ from run to run, so their block scales are found at run "
                 "time. Leave it out");
  }
  if (!quantizes) return;
  const TensorView &fc1 = inputs[kFc1ActScale], &fc2 = inputs[kFc2ActScale];
  QMOE_REQUIRE(fc1.present == fc2.present, "input ", fc1.present ? 17 : 18,
               " (activation scale) is given without input ", fc1.present ? 18 : 17,
               "; give both, or none for block scales found at run time");
  config.activation_quant = fc1.present ? ActivationQuant::kFp8 : ActivationQuant::kMxFp8;
  if (!fc1.present) return;
  config.fc1_act_scales = ReadActScales(kFc1ActScale, fc1, config.experts);
  config.fc2_act_scales = ReadActScales(kFc2ActScale, fc2, config.experts);
}

}  // namespace qmoe_plugin::ort
