#include "ops/ort/qmoe_scales.h"

#include <array>

#include "ops/error.h"
#include "ops/ort/int_format.h"
#include "ops/ort/packed_node.h"

namespace qmoe_plugin::ort {
namespace {

using Tensors = std::vector<TensorView>;

constexpr std::array kQuantTypes{
    QuantType{"int", nullptr, DType::kFloat32, 0, false},
    QuantType{"fp4", "mxfp4", DType::kFloat8E8M0, 32, false},
    QuantType{"nvfp4", "nvfp4", DType::kFloat8E4M3, 16, false},
    QuantType{"fp8", "fp8_e4m3", DType::kFloat32, 0, true},
    QuantType{"wfp4afp8", "mxfp4", DType::kFloat8E8M0, 32, false},
};

const QuantType& FindQuantType(const std::string& name) {
  for (const QuantType& type : kQuantTypes)
    if (name == type.name) return type;
  FailInvalid("quant_type is \"", name, "\"; allowed are int, fp4, nvfp4, fp8 and wfp4afp8");
}

int64_t FindBlockSize(const QuantType& type, std::optional<int64_t> given) {
  if (type.block_size) {
    QMOE_REQUIRE(given.value_or(type.block_size) == type.block_size, "block_size is ", *given,
                 "; quant_type \"", type.name, "\" has blocks of ", type.block_size,
                 ", so leave it out");
    return type.block_size;
  }
  const int64_t block_size = given.value_or(0);
  QMOE_REQUIRE(
      block_size == 0 ||
          (block_size >= 16 && block_size <= 65536 && (block_size & (block_size - 1)) == 0),
      "block_size is ", block_size, "; it must be a power of two from 16 to 65536, or 0 for one ",
      type.square_blocks ? "factor an expert" : "scale a row");
  return block_size;
}

void CheckScaleType(const QuantType& type, size_t input, const TensorView& scales) {
  switch (type.scales) {
    case DType::kFloat8E8M0:
      if (IsFloat(scales.dtype)) {
        FailInvalid(
            "quant_type is \"", type.name, "\", but input ", input, " (scales) is ",
            scales.Describe(),
            ", not float8e8m0. The model builder of onnxruntime-genai 0.18 writes such nodes for "
            "Qwen3.5-MoE with moe_quant_type=mxfp4: they hold prepacked int4 weights. Export the "
            "model again with moe_quant_type=int4");
      }
      QMOE_REQUIRE(scales.dtype == DType::kFloat8E8M0 || scales.dtype == DType::kUint8, "input ",
                   input, " (scales) is ", scales.Describe(), "; scales of quant_type \"",
                   type.name, "\" must be float8e8m0, or uint8 with the same bytes");
      return;
    case DType::kFloat8E4M3:
      QMOE_REQUIRE(scales.dtype == DType::kFloat8E4M3, "input ", input, " (scales) is ",
                   scales.Describe(), "; scales of quant_type \"", type.name,
                   "\" must be float8e4m3fn", scales.dtype == DType::kUint8 ? ", not bytes" : "");
      return;
    default:
      QMOE_REQUIRE(IsFloat(scales.dtype), "input ", input, " (scales) is ", scales.Describe(),
                   "; allowed with quant_type \"", type.name,
                   "\" are float32, float16 and bfloat16");
  }
}

void CheckScales(const ScalePlan& plan, size_t input, const TensorView& scales) {
  if (!plan.has_scales) {
    QMOE_REQUIRE(!scales.present, "input ", input, " (scales) is ", scales.Describe(),
                 ", but quant_type \"fp8\" without block_size has a factor an expert (inputs 15 "
                 "and 16) and no other scales; leave it out, or set block_size");
    return;
  }
  QMOE_REQUIRE(scales.present, "input ", input, " (scales) is missing; quant_type \"",
               plan.type->name, "\" needs scales for every weight");
  CheckScaleType(*plan.type, input, scales);
  const size_t rank = scales.shape.size();
  QMOE_REQUIRE(rank == 2 || rank == 3, "input ", input, " (scales) is ", scales.Describe(),
               "; it must be [E, N], or [E, N, K / block_size]");
  QMOE_REQUIRE(plan.block_size > 0 || rank == 2 || scales.shape[2] == 1, "input ", input,
               " (scales) is ", scales.Describe(),
               ", several scales a row, but the node has no block_size; set the attribute to the "
               "number of weights that share a scale");
}

void CheckGlobalScales(const ScalePlan& plan, const Tensors& inputs) {
  for (const size_t input : {kFc1GlobalScale, kFc2GlobalScale}) {
    const TensorView& scale = inputs[input];
    QMOE_REQUIRE(plan.has_global_scales || !scale.present, "input ", input, " (global scale) is ",
                 scale.Describe(), ", but quant_type \"", plan.type->name, "\" ",
                 plan.type->square_blocks ? "with block_size has a scale a square block"
                                          : "has no global scales",
                 "; leave it out");
    QMOE_REQUIRE(!plan.has_global_scales || scale.present, "input ", input,
                 " (global scale) is missing; quant_type \"", plan.type->name,
                 "\" needs one factor an expert, float32 [E]. Where there is nothing to scale, "
                 "give ones");
  }
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

ScalePlan PlanScales(const QMoeAttributes& a, const Tensors& inputs, bool has_fc3) {
  ScalePlan plan{.type = &FindQuantType(a.quant_type)};
  const QuantType& type = *plan.type;
  plan.block_size = FindBlockSize(type, a.block_size);
  if (type.square_blocks) {
    plan.has_scales = plan.block_size > 0;
    plan.scale_rows = plan.has_scales ? plan.block_size : 1;
  }
  plan.has_global_scales = type.block_size > 0 || !plan.has_scales;
  if (a.weights_layout == kPackedLayout) return plan;  // they are in the weights
  QMOE_REQUIRE(!has_fc3 || !plan.has_global_scales,
               "fc3_experts_weights is given, but quant_type \"", type.name, "\"",
               type.square_blocks ? " without block_size" : "",
               " needs a global scale for each projection, and there is no input for that of fc3; "
               "store gates and ups together in fc1 (swiglu_fusion 1 or 2)");
  for (const size_t input : {kFc1Scales, kFc2Scales, kFc3Scales})
    if (input != kFc3Scales || has_fc3) CheckScales(plan, input, inputs[input]);
  CheckGlobalScales(plan, inputs);
  return plan;
}

const Format& WeightFormat(const ScalePlan& plan, const char* attribute,
                           std::optional<int64_t> bits) {
  if (!plan.type->format) {
    const int64_t width = bits.value_or(4);
    QMOE_REQUIRE(width == 2 || width == 4 || width == 8, attribute, " is ", width,
                 "; allowed are 2, 4 and 8");
    return IntFormat(int(width));
  }
  const Format& format = GetFormat(plan.type->format);
  QMOE_REQUIRE(bits.value_or(format.bits) == format.bits, attribute, " is ", *bits,
               "; quant_type \"", plan.type->name, "\" has ", format.bits, " bits a weight");
  return format;
}

void PlanActivationQuant(const ScalePlan& plan, const Tensors& inputs, MoeConfig& config) {
  const bool quantizes = std::string(plan.type->name) == "wfp4afp8";
  for (size_t i = kFc1ActScale; i < kQMoeInputs; ++i) {
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
