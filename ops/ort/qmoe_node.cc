#include "ops/ort/qmoe_node.h"

#include <cmath>
#include <limits>

#include "ops/error.h"
#include "ops/ort/int_format.h"

namespace qmoe_plugin::ort {
namespace {

using Tensors = std::vector<TensorView>;

/// How the rows of fc1 (and fc3) feed the activation.
struct ActivationPlan {
  ActivationParams params;
  RowOrder order = RowOrder::kAsStored;
  int64_t rows_per_unit = 1;  // F
};

void RequireFlag(const char* attribute, int64_t value) {
  QMOE_REQUIRE(value == 0 || value == 1, attribute, " is ", value, "; it must be 0 or 1");
}

void RefuseQuantType(const QMoeAttributes& a, const Tensors& inputs) {
  const std::string& type = a.quant_type;
  if (type == "fp4" || type == "nvfp4" || type == "fp8" || type == "wfp4afp8") {
    FailUnsupported("quant_type is \"", type,
                    "\"; this release runs \"int\" only. Leave the node in com.microsoft, or "
                    "quantize the experts to int4 or int8");
  }
  QMOE_REQUIRE(type == "int", "quant_type is \"", type,
               "\"; allowed are int, fp4, nvfp4, fp8 and wfp4afp8");
  for (size_t i = kFc1GlobalScale; i < kQMoeInputs; ++i) {
    QMOE_REQUIRE(!inputs[i].present, "input ", i, " is given (", inputs[i].Describe(),
                 "), but inputs 15 to 20, global and activation scales, belong to other "
                 "quant_types than \"int\"; leave it out");
  }
}

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
  const ActivationParams params{type, a.activation_alpha, a.activation_beta,
                                a.swiglu_limit.value_or(std::numeric_limits<float>::infinity())};
  QMOE_REQUIRE(std::isfinite(params.alpha) && std::isfinite(params.beta), "activation_alpha is ",
               params.alpha, " and activation_beta ", params.beta, "; both must be finite");
  QMOE_REQUIRE(params.limit > 0, "swiglu_limit is ", params.limit,
               "; it must be positive (leave it out for no limit)");
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

ActivationPlan PlanActivation(const QMoeAttributes& a, bool has_fc3) {
  const Activation type = ParseActivation(a.activation_type);
  QMOE_REQUIRE(a.swiglu_fusion >= 0 && a.swiglu_fusion <= 2, "swiglu_fusion is ", a.swiglu_fusion,
               "; allowed are 0 (fc1 and fc3), 1 (interleaved) and 2 (gates, then ups)");
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

/// The block size that attribute and scales agree on, 0 for per channel.
int64_t BlockSize(const QMoeAttributes& a, const Tensors& inputs, bool has_fc3) {
  const int64_t block_size = a.block_size.value_or(0);
  QMOE_REQUIRE(block_size == 0 || (block_size >= 16 && block_size <= 65536 &&
                                   (block_size & (block_size - 1)) == 0),
               "block_size is ", block_size,
               "; it must be a power of two from 16 to 65536, or 0 for one scale a row");
  for (const size_t i : {kFc1Scales, kFc2Scales, kFc3Scales}) {
    if (i == kFc3Scales && !has_fc3) continue;
    const TensorView& scales = inputs[i];
    QMOE_REQUIRE(scales.present, "input ", i,
                 " (scales) is missing; quant_type \"int\" needs scales for every weight");
    QMOE_REQUIRE(scales.shape.size() == 2 || scales.shape.size() == 3, "input ", i, " (scales) is ",
                 scales.Describe(), "; it must be [E, N], or [E, N, K / block_size]");
    QMOE_REQUIRE(block_size > 0 || scales.shape.size() == 2 || scales.shape[2] == 1, "input ", i,
                 " (scales) is ", scales.Describe(),
                 ", several scales a row, but the node has no block_size; set the attribute to the "
                 "number of weights that share a scale");
  }
  return block_size;
}

struct Sizes {
  int64_t experts, hidden, inter;  // E, H, I
};

std::vector<int64_t> RawShape(const Sizes& s, int64_t n, int64_t k, int bits) {
  return {s.experts, n, k * bits / 8};
}

std::vector<int64_t> PrepackedShape(const Sizes& s, int64_t n, int64_t k, int bits) {
  return {s.experts, k, n * bits / 8};
}

/// The scales say which dimension is which: [E, F * I, ...] for fc1 and [E, H, ...] for fc2,
/// whatever the layout.
Sizes FindSizes(const Tensors& inputs, int64_t rows_per_unit) {
  const std::vector<int64_t>&fc1 = inputs[kFc1Scales].shape, &fc2 = inputs[kFc2Scales].shape;
  for (const auto* shape : {&fc1, &fc2})
    for (const int64_t dim : *shape)
      QMOE_REQUIRE(dim > 0, "fc1_scales is ", inputs[kFc1Scales].Describe(), " and fc2_scales is ",
                   inputs[kFc2Scales].Describe(), "; no dimension may be 0");
  QMOE_REQUIRE(fc1[1] % rows_per_unit == 0, "fc1_scales is ", inputs[kFc1Scales].Describe(),
               "; gates and ups together must be an even number of rows");
  return {fc1[0], fc2[1], fc1[1] / rows_per_unit};
}

/// The weights of one projection.
struct Matrix {
  size_t input;  // a QMoeInput
  int64_t n, k;  // rows and columns
  int bits;
};

/// Refuses weights that are not raw.
void CheckLayout(const QMoeAttributes& a, const Tensors& inputs, const Sizes& sizes,
                 const std::vector<Matrix>& matrices, std::string& warning) {
  QMOE_REQUIRE(a.weights_prepacked >= -1 && a.weights_prepacked <= 1, "weights_prepacked is ",
               a.weights_prepacked, "; allowed are 0 (raw), 1 (SM80 fpA_intB) and -1 (not said)");
  bool raw = true, prepacked = true;
  for (const Matrix& m : matrices) {
    raw &= inputs[m.input].shape == RawShape(sizes, m.n, m.k, m.bits);
    prepacked &= inputs[m.input].shape == PrepackedShape(sizes, m.n, m.k, m.bits);
  }
  if (a.weights_prepacked == 1 || (a.weights_prepacked == -1 && prepacked && !raw)) {
    FailUnsupported(
        "the experts' weights are prepacked for SM80 (fpA_intB, fc1 is ",
        inputs[matrices[0].input].Describe(),
        a.weights_prepacked == 1 ? ", weights_prepacked=1" : "",
        "); this release reads raw weights. Export with qmoe_weights_prepacked=0, or for the CPU");
  }
  for (const Matrix& m : matrices) {
    const std::vector<int64_t> wanted = RawShape(sizes, m.n, m.k, m.bits);
    QMOE_REQUIRE(inputs[m.input].shape == wanted, "input ", m.input, " (weights) is ",
                 inputs[m.input].Describe(), "; raw ", m.bits,
                 "-bit weights of this node must be uint8[", wanted[0], ", ", wanted[1], ", ",
                 wanted[2], "], as fc1_scales ", inputs[kFc1Scales].Describe(), " and fc2_scales ",
                 inputs[kFc2Scales].Describe(), " say experts ", sizes.experts, ", hidden_size ",
                 sizes.hidden, " and inter_size ", sizes.inter);
  }
  if (a.weights_prepacked == -1 && prepacked) {
    warning =
        "the node does not say whether its weights are raw or prepacked, and both have the same "
        "shapes; they are read as raw. Write weights_prepacked=0 if that is right; if the model "
        "was exported for CUDA, export it again with qmoe_weights_prepacked=0";
  }
}

int Bits(const char* attribute, int64_t bits) {
  QMOE_REQUIRE(bits == 2 || bits == 4 || bits == 8, attribute, " is ", bits,
               "; allowed are 2, 4 and 8");
  return int(bits);
}

Projection MakeProjection(const char* name, const Tensors& inputs, const Sizes& sizes,
                          const Matrix& m, int64_t block_size, QMoeInput zero_points) {
  // Scales, bias and weights follow each other in the list of inputs.
  return {.name = name,
          .format = &IntFormat(m.bits),
          .experts = sizes.experts,
          .n = m.n,
          .k = m.k,
          .block_size = block_size,
          .codes = inputs[m.input],
          .scales = inputs[m.input + 1],
          .zero_points = inputs[zero_points],
          .bias = inputs[m.input + 2],
          .group_index = {}};
}

}  // namespace

QMoeNode InterpretQMoe(const QMoeAttributes& a, const Tensors& inputs, DType dtype) {
  RefuseQuantType(a, inputs);
  RequireFlag("normalize_routing_weights", a.normalize_routing_weights);
  RequireFlag("use_sparse_mixer", a.use_sparse_mixer);
  QMOE_REQUIRE(a.accuracy_level >= 0 && a.accuracy_level <= 4, "accuracy_level is ",
               a.accuracy_level, "; allowed are 0 to 4");
  const bool has_fc3 = inputs[kFc3Weights].present;
  QMOE_REQUIRE(has_fc3 || !(inputs[kFc3Scales].present || inputs[kFc3Bias].present ||
                            inputs[kFc3ZeroPoints].present),
               "fc3 scales, bias or zero points are given without fc3_experts_weights; give all of "
               "fc3 or none");
  const ActivationPlan plan = PlanActivation(a, has_fc3);

  Bits("expert_weight_bits", a.expert_weight_bits);
  const int fc1_bits =
      Bits("fc1_expert_weight_bits", a.fc1_expert_weight_bits.value_or(a.expert_weight_bits));
  const int fc2_bits =
      Bits("fc2_expert_weight_bits", a.fc2_expert_weight_bits.value_or(a.expert_weight_bits));
  const int fc3_bits = Bits("fc3_expert_weight_bits", a.fc3_expert_weight_bits.value_or(fc1_bits));
  QMOE_REQUIRE(fc3_bits == fc1_bits, "fc3_expert_weight_bits is ", fc3_bits, " and fc1 has ",
               fc1_bits, " bits; gates and ups must have the same");

  const int64_t block_size = BlockSize(a, inputs, has_fc3);
  const Sizes sizes = FindSizes(inputs, plan.rows_per_unit);
  const Matrix fc1{kFc1Weights, plan.rows_per_unit * sizes.inter, sizes.hidden, fc1_bits};
  const Matrix fc2{kFc2Weights, sizes.hidden, sizes.inter, fc2_bits};
  const Matrix fc3{kFc3Weights, sizes.inter, sizes.hidden, fc3_bits};
  std::vector<Matrix> matrices{fc1, fc2};
  if (has_fc3) matrices.push_back(fc3);

  QMoeNode node;
  CheckLayout(a, inputs, sizes, matrices, node.warning);
  const int64_t unit = block_size ? block_size : 8;
  QMOE_REQUIRE(sizes.hidden % unit == 0 && sizes.inter % unit == 0, "hidden_size ", sizes.hidden,
               " and inter_size ", sizes.inter, " must be multiples of ",
               block_size ? "block_size " : "", unit);

  node.config = {.dtype = dtype,
                 .hidden_size = sizes.hidden,
                 .inter_size = sizes.inter,
                 .experts = sizes.experts,
                 .topk = a.k,
                 .normalize_routing_weights = a.normalize_routing_weights == 1,
                 .use_sparse_mixer = a.use_sparse_mixer == 1,
                 .activation = plan.params,
                 .accuracy_level = AccuracyLevel(a.accuracy_level)};
  node.weights.fc1 = MakeProjection("fc1", inputs, sizes, fc1, block_size, kFc1ZeroPoints);
  node.weights.fc1_order = plan.order;
  node.weights.fc2 = MakeProjection("fc2", inputs, sizes, fc2, block_size, kFc2ZeroPoints);
  if (has_fc3)
    node.weights.fc3 = MakeProjection("fc3", inputs, sizes, fc3, block_size, kFc3ZeroPoints);
  return node;
}

}  // namespace qmoe_plugin::ort
