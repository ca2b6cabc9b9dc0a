#include "ops/ort/matmul_block_quantized_node.h"

#include <string>

#include "ops/error.h"

namespace qmoe_plugin::ort {
namespace {

/// The tensor with a leading dimension for the one expert.
TensorView OneExpert(TensorView tensor) {
  if (tensor.present) tensor.shape.insert(tensor.shape.begin(), 1);
  return tensor;
}

/// A float32 scalar, or the same as [1].
TensorView Scalar(TensorView tensor, const char* input) {
  QMOE_REQUIRE(tensor.dtype == DType::kFloat32 &&
                   (tensor.shape.empty() || tensor.shape == std::vector<int64_t>{1}),
               input, " is ", tensor.Describe(), "; it must be a float32 scalar");
  tensor.shape = {1};
  return tensor;
}

/// What both ops share: sizes from B [N, K / codes_in_a_byte], blocks, bias.
MatMulNBitsNode MakeNode(const char* format, int64_t block_size, const TensorView& b,
                         const TensorView& bias, DType dtype) {
  QMOE_REQUIRE(b.shape.size() == 2 && b.elements() > 0, "input 1 (B) is ", b.Describe(),
               "; it must have two dimensions, none of them 0");
  QMOE_REQUIRE(block_size >= 16 && block_size <= 65536 && (block_size & (block_size - 1)) == 0,
               "block_size is ", block_size, "; it must be a power of two from 16 to 65536");
  const std::vector<int64_t> rows{b.shape[0]};
  QMOE_REQUIRE(!bias.present || bias.shape == rows, "bias is ", bias.Describe(), "; it must be [",
               rows[0], "] = [N]");
  MatMulNBitsNode node;
  Projection& weights = node.weights;
  weights.name = std::string("B");  // an assignment of "B" makes GCC 12 warn
  weights.format = &GetFormat(format);
  weights.n = b.shape[0];
  weights.k = b.shape[1] * 8 / weights.format->bits;
  weights.block_size = block_size;
  weights.codes = OneExpert(b);
  weights.bias = OneExpert(bias);
  node.config.dtype = dtype;
  node.config.n = weights.n;
  node.config.k = weights.k;
  return node;
}

}  // namespace

MatMulNBitsNode InterpretFp8Weight(int64_t block_size, const std::vector<TensorView>& inputs,
                                   DType dtype) {
  const auto input = [&](Fp8WeightInput index) { return inputs[size_t(index)]; };
  MatMulNBitsNode node = MakeNode("fp8_e4m3", block_size, input(Fp8WeightInput::kB),
                                  input(Fp8WeightInput::kBias), dtype);
  const TensorView scales = input(Fp8WeightInput::kBScale);
  QMOE_REQUIRE(IsFloat(scales.dtype), "input 2 (b_scale) is ", scales.Describe(),
               "; allowed are float32, float16 and bfloat16");
  node.weights.scales = OneExpert(scales);
  if (const TensorView a_scale = input(Fp8WeightInput::kAScale); a_scale.present)
    node.config.act_scale = LoadFloat(Scalar(a_scale, "input 3 (a_scale)").data, a_scale.dtype, 0);
  return node;
}

MatMulNBitsNode InterpretFp4Weight(int64_t block_size, const std::vector<TensorView>& inputs,
                                   DType dtype) {
  const auto input = [&](Fp4WeightInput index) { return inputs[size_t(index)]; };
  MatMulNBitsNode node =
      MakeNode("nvfp4", block_size, input(Fp4WeightInput::kB), input(Fp4WeightInput::kBias), dtype);
  TensorView scales = input(Fp4WeightInput::kWeightScale);
  QMOE_REQUIRE(scales.dtype == DType::kUint8 || scales.dtype == DType::kFloat8E4M3,
               "input 2 (weight_scale) is ", scales.Describe(),
               "; it must be uint8, the bytes of float8e4m3fn numbers, or float8e4m3fn");
  scales.dtype = DType::kFloat8E4M3;
  node.weights.scales = OneExpert(scales);
  node.weights.global_scale =
      Scalar(input(Fp4WeightInput::kWeightScale2), "input 3 (weight_scale_2)");
  if (const TensorView unused = input(Fp4WeightInput::kInputScale); unused.present)
    Scalar(unused, "input 4 (input_scale)");
  return node;
}

}  // namespace qmoe_plugin::ort
