// MatMulNBits, MatMulBlockQuantizedFp8Weight and MatMulBlockQuantizedFp4Weight as ONNX Runtime kernels:
// read the node, pack its weights, run it. The ops differ in how a node is read only.
#include "ops/matmul_nbits/matmul_nbits.h"

#include "ops/domain.h"
#include "ops/ort/custom_op.h"
#include "ops/ort/mapped_pages.h"
#include "ops/ort/matmul_block_quantized_node.h"
#include "ops/ort/matmul_nbits_node.h"
#include "ops/ort/node_info.h"
#include "ops/ort/run_context.h"
#include "ops/ort/tensors.h"

namespace qmoe_plugin::ort {
namespace {

constexpr InputSpec kInputs[] = {
    {"A", false, false},
    {"B", false, true},
    {"scales", true, true, ScaleSet::kFirst},
    {"zero_points", true, true},
    {"g_idx", true, true},
    {"bias", true, true},
    {"codebook", true, true},
    {"global_scale", true, true},
};
static_assert(std::size(kInputs) == kMatMulNBitsInputs);

constexpr InputSpec kFp8WeightInputs[] = {
    {"A", false, false},     {"B", false, true},   {"b_scale", true, true},
    {"a_scale", true, true}, {"bias", true, true},
};
static_assert(std::size(kFp8WeightInputs) == size_t(Fp8WeightInput::kCount));

constexpr InputSpec kFp4WeightInputs[] = {
    {"A", false, false},          {"B", false, true},
    {"weight_scale", true, true}, {"weight_scale_2", true, true},
    {"input_scale", true, true},  {"bias", true, true},
};
static_assert(std::size(kFp4WeightInputs) == size_t(Fp4WeightInput::kCount));

class MatMulNBitsKernel : public OpKernel {
 public:
  /// `inputs` are the constant ones that `node` was read from.
  MatMulNBitsKernel(const NodeInfo& info, const MatMulNBitsNode& node,
                    std::vector<TensorView> inputs) {
    config_ = node.config;
    matmul_ = MakeMatMulNBits(info.device(), node.config, node.weights);
    if (StaysInUse(node.weights, info.device())) inputs[kB] = {};
    ReleaseMappedPages(inputs);
    info.LogPacked(std::vector{matmul_->Packed()}, node.weights.packed.present);
  }

  void Run(const RunContext& run) const override {
    const Input a = run.GetInput(kA);
    QMOE_REQUIRE(!a.shape.empty() && a.shape.back() == config_.k, "input 0 (A) has shape ",
                 ShapeText(a.shape), "; its last dimension must be K = ", config_.k);
    std::vector<int64_t> shape(a.shape.begin(), a.shape.end());
    shape.back() = config_.n;
    const MatMulTensors tensors{
        .m = Product(a.shape.first(a.shape.size() - 1)), .a = a.data, .y = run.Output(shape)};
    if (tensors.m == 0) return;
    run.Execute(matmul_->WorkspaceBytes(tensors.m),
                [&](const ExecutionContext& context) { matmul_->Run(tensors, context); });
  }

 private:
  MatMulConfig config_;
  std::unique_ptr<MatMulNBits> matmul_;
};

}  // namespace

const OpSpec& MatMulNBitsOp() {
  static const OpSpec spec{
      .name = kMatMulNBitsOpName,
      .inputs = kInputs,
      .last_dim_attribute = "N",
      .in_place = false,
      .make_kernel = [](const NodeInfo& info) -> std::unique_ptr<OpKernel> {
        const std::vector<TensorView> inputs = info.ConstantInputs();
        const MatMulNBitsNode node =
            InterpretMatMulNBits(ReadMatMulNBitsAttributes(info), inputs, info.dtype());
        return std::make_unique<MatMulNBitsKernel>(info, node, inputs);
      },
  };
  return spec;
}

const OpSpec& Fp8WeightOp() {
  static const OpSpec spec{
      .name = kFp8WeightOpName,
      .inputs = kFp8WeightInputs,
      .last_dim_attribute = "N",
      .last_dim_input = size_t(Fp8WeightInput::kB),
      .in_place = false,
      .make_kernel = [](const NodeInfo& info) -> std::unique_ptr<OpKernel> {
        const std::vector<TensorView> inputs = info.ConstantInputs();
        const MatMulNBitsNode node =
            InterpretFp8Weight(ReadBlockQuantizedAttributes(info), inputs, info.dtype());
        return std::make_unique<MatMulNBitsKernel>(info, node, inputs);
      },
  };
  return spec;
}

const OpSpec& Fp4WeightOp() {
  static const OpSpec spec{
      .name = kFp4WeightOpName,
      .inputs = kFp4WeightInputs,
      .last_dim_attribute = "N",
      .last_dim_input = size_t(Fp4WeightInput::kB),
      .in_place = false,
      .make_kernel = [](const NodeInfo& info) -> std::unique_ptr<OpKernel> {
        const std::vector<TensorView> inputs = info.ConstantInputs();
        const MatMulNBitsNode node =
            InterpretFp4Weight(ReadBlockQuantizedAttributes(info), inputs, info.dtype());
        return std::make_unique<MatMulNBitsKernel>(info, node, inputs);
      },
  };
  return spec;
}

}  // namespace qmoe_plugin::ort
