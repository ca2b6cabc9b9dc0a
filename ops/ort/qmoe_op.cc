// QMoE and MoE as ONNX Runtime kernels: read the node, pack its weights, run it. The ops differ in
// their inputs only.
#include "ops/qmoe/qmoe.h"

#include "ops/domain.h"
#include "ops/ort/custom_op.h"
#include "ops/ort/mapped_pages.h"
#include "ops/ort/moe_node.h"
#include "ops/ort/node_info.h"
#include "ops/ort/qmoe_node.h"
#include "ops/ort/run_context.h"
#include "ops/ort/tensors.h"

namespace qmoe_plugin::ort {
namespace {

constexpr InputSpec kInputs[] = {
    {"input", false, false},
    {"router_probs", false, false},
    {"fc1_experts_weights", false, true},
    {"fc1_scales", true, true, ScaleSet::kFirst},
    {"fc1_experts_bias", true, true},
    {"fc2_experts_weights", false, true},
    {"fc2_scales", true, true, ScaleSet::kSecond},
    {"fc2_experts_bias", true, true},
    {"fc3_experts_weights", true, true},
    {"fc3_scales", true, true, ScaleSet::kFirst},
    {"fc3_experts_bias", true, true},
    {"fc1_zero_points", true, true},
    {"fc2_zero_points", true, true},
    {"fc3_zero_points", true, true},
    {"router_weights", true, false},
    {"fc1_global_scale", true, true},
    {"fc2_global_scale", true, true},
    {"fc1_act_scale", true, true},
    {"fc2_act_scale", true, true},
    {"fc1_act_block_scale", true, true, ScaleSet::kFirst},
    {"fc2_act_block_scale", true, true, ScaleSet::kSecond},
    {"fc1_codebook", true, true},
    {"fc2_codebook", true, true},
};
static_assert(std::size(kInputs) == kQMoeInputs);

constexpr InputSpec kMoEInputs[] = {
    {"input", false, false},
    {"router_probs", false, false},
    {"fc1_experts_weights", false, true},
    {"fc1_experts_bias", true, true},
    {"fc2_experts_weights", false, true},
    {"fc2_experts_bias", true, true},
    {"fc3_experts_weights", true, true},
    {"fc3_experts_bias", true, true},
};
static_assert(std::size(kMoEInputs) == size_t(MoEInput::kCount));

class QMoeKernel : public OpKernel {
 public:
  /// `inputs` are the constant ones that `node` was read from, `fc1` and `fc2` those of weights.
  QMoeKernel(const NodeInfo& info, const QMoeNode& node, std::vector<TensorView> inputs, size_t fc1,
             size_t fc2) {
    if (!node.warning.empty()) info.Log(ORT_LOGGING_LEVEL_WARNING, node.warning);
    config_ = node.config;
    moe_ = MakeQMoe(info.device(), node.config, node.weights);
    if (StaysInUse(node.weights.fc1, info.device())) inputs[fc1] = {};
    if (StaysInUse(node.weights.fc2, info.device())) inputs[fc2] = {};
    ReleaseMappedPages(inputs);
    info.LogPacked(moe_->Packed(), node.weights.fc1.packed.present);
  }

  void Run(const RunContext& run) const override {
    const Input input = run.GetInput(kInput);
    MoeTensors tensors;
    tensors.tokens = CountTokens(input);
    tensors.input = input.data;
    const Input probs = run.GetInput(kRouterProbs);
    const Input weights = run.GetInput(kRouterWeights);  // MoE has not so many inputs
    QMOE_REQUIRE(probs.present, "input 1 (router_probs) is missing");
    CheckRouterInput("input 1 (router_probs)", probs, tensors.tokens);
    tensors.router_probs = probs.data;
    tensors.router_probs_dtype = probs.dtype;
    if (weights.present) {
      CheckRouterInput("input 14 (router_weights)", weights, tensors.tokens);
      tensors.router_weights = weights.data;
      tensors.router_weights_dtype = weights.dtype;
    }
    tensors.output = run.Output(input.shape);
    if (tensors.tokens == 0) return;
    run.Execute(moe_->WorkspaceBytes(tensors.tokens),
                [&](const ExecutionContext& context) { moe_->Run(tensors, context); });
  }

 private:
  /// Tokens of [tokens, H] or [batch, sequence, H].
  int64_t CountTokens(const Input& input) const {
    const auto& shape = input.shape;
    QMOE_REQUIRE((shape.size() == 2 || shape.size() == 3) && shape.back() == config_.hidden_size,
                 "input 0 (input) has shape ", ShapeText(shape), "; it must be [tokens, ",
                 config_.hidden_size, "] or [batch, sequence, ", config_.hidden_size,
                 "], hidden_size being ", config_.hidden_size);
    return Product(shape.first(shape.size() - 1));
  }

  void CheckRouterInput(const char* name, const Input& input, int64_t tokens) const {
    const auto& shape = input.shape;
    QMOE_REQUIRE(IsFloat(input.dtype), name, " is ", Name(input.dtype),
                 "; allowed are float32, float16 and bfloat16");
    QMOE_REQUIRE((shape.size() == 2 || shape.size() == 3) && shape.back() == config_.experts &&
                     Product(shape.first(shape.size() - 1)) == tokens,
                 name, " has shape ", ShapeText(shape), "; it must be [tokens, experts] = [",
                 tokens, ", ", config_.experts,
                 "], or the same with tokens split into [batch, sequence]");
  }

  MoeConfig config_;
  std::unique_ptr<QMoe> moe_;
};

}  // namespace

const OpSpec& QMoeOp() {
  static const OpSpec spec{
      .name = kQMoeOpName,
      .inputs = kInputs,
      .last_dim_attribute = nullptr,
      .in_place = true,
      .make_kernel = [](const NodeInfo& info) -> std::unique_ptr<OpKernel> {
        const std::vector<TensorView> inputs = info.ConstantInputs();
        const QMoeNode node = InterpretQMoe(ReadQMoeAttributes(info), inputs, info.dtype());
        return std::make_unique<QMoeKernel>(info, node, inputs, kFc1Weights, kFc2Weights);
      },
  };
  return spec;
}

const OpSpec& MoEOp() {
  static const OpSpec spec{
      .name = kMoEOpName,
      .inputs = kMoEInputs,
      .last_dim_attribute = nullptr,
      .in_place = true,
      .make_kernel = [](const NodeInfo& info) -> std::unique_ptr<OpKernel> {
        const std::vector<TensorView> inputs = info.ConstantInputs();
        const QMoeNode node = InterpretMoE(ReadMoEAttributes(info), inputs, info.dtype());
        return std::make_unique<QMoeKernel>(info, node, inputs, size_t(MoEInput::kFc1Weights),
                                            size_t(MoEInput::kFc2Weights));
      },
  };
  return spec;
}

}  // namespace qmoe_plugin::ort
