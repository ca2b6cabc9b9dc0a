#include "ops/ort/matmul_block_quantized_node.h"

#include <string>
#include <utility>

#include "ops/error.h"
#include "ops/ort/packed_node.h"

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

MatMulNBitsNode MakeNode(Projection weights, DType dtype) {
  MatMulNBitsNode node;
  node.config.dtype = dtype;
  node.config.n = weights.n;
  node.config.k = weights.k;
  node.weights = std::move(weights);
  return node;
}

/// What both ops share: sizes from B [N, K / codes_in_a_byte], blocks, bias.
MatMulNBitsNode TakeStored(const Format& format, int64_t block_size,
                           const BlockQuantizedAttributes& a, const TensorView& b,
                           const TensorView& bias, DType dtype) {
  QMOE_REQUIRE(!a.n && !a.k, "attributes N and K are for packed weights, and B, which is ",
               b.Describe(), ", says them; leave them out");
  QMOE_REQUIRE(b.shape.size() == 2 && b.elements() > 0, "input 1 (B) is ", b.Describe(),
               "; it must have two dimensions, none of them 0");
  const std::vector<int64_t> rows{b.shape[0]};
  QMOE_REQUIRE(!bias.present || bias.shape == rows, "bias is ", bias.Describe(), "; it must be [",
               rows[0], "] = [N]");
  Projection weights;
  weights.name = std::string("B");  // an assignment of "B" makes GCC 12 warn
  weights.format = &format;
  weights.n = b.shape[0];
  weights.k = b.shape[1] * 8 / format.bits;
  weights.block_size = block_size;
  weights.codes = OneExpert(b);
  weights.bias = OneExpert(bias);
  return MakeNode(std::move(weights), dtype);
}

/// Weights that were packed before. MakeMatMulNBits checks their sizes, and that neither scales nor a
/// bias are given.
MatMulNBitsNode TakePacked(const Format& format, int64_t block_size,
                           const BlockQuantizedAttributes& a, const TensorView& b,
                           const TensorView& scales, const TensorView& global_scale,
                           const TensorView& bias, DType dtype) {
  QMOE_REQUIRE(a.n && a.k, "weights_layout is \"packed\", but attribute ", a.n ? "K" : "N",
               " is missing; packed weights need N and K beside them");
  Projection weights = PackedProjection("B", b, format, block_size);
  weights.scales = scales;
  weights.global_scale = global_scale;
  weights.bias = bias;
  MatMulNBitsNode node = MakeNode(std::move(weights), dtype);
  node.config.n = *a.n;
  node.config.k = *a.k;
  return node;
}

int64_t BlockSize(const BlockQuantizedAttributes& a, int64_t otherwise) {
  const int64_t block_size = a.block_size.value_or(otherwise);
  QMOE_REQUIRE(block_size >= 16 && block_size <= 65536 && (block_size & (block_size - 1)) == 0,
               "block_size is ", block_size, "; it must be a power of two from 16 to 65536");
  return block_size;
}

constexpr char kNoLayouts[] = "These weights have no other layouts";

}  // namespace

BlockQuantizedAttributes ReadBlockQuantizedAttributes(const Attributes& node) {
  BlockQuantizedAttributes a;
  a.block_size = node.FindInt("block_size");
  a.n = node.FindInt("N");
  a.k = node.FindInt("K");
  a.weights_layout = node.String("weights_layout", a.weights_layout);
  return a;
}

MatMulNBitsNode InterpretFp8Weight(const BlockQuantizedAttributes& a,
                                   const std::vector<TensorView>& inputs, DType dtype) {
  const auto input = [&](Fp8WeightInput index) { return inputs[size_t(index)]; };
  const Format& format = GetFormat("fp8_e4m3");
  const int64_t block_size = BlockSize(a, 128);
  const TensorView b = input(Fp8WeightInput::kB), bias = input(Fp8WeightInput::kBias),
                   scales = input(Fp8WeightInput::kBScale);
  MatMulNBitsNode node;
  if (IsPacked(a.weights_layout, kNoLayouts)) {
    node = TakePacked(format, block_size, a, b, scales, {}, bias, dtype);
  } else {
    node = TakeStored(format, block_size, a, b, bias, dtype);
    QMOE_REQUIRE(scales.present, "input 2 (b_scale) is missing; weights need scales");
    QMOE_REQUIRE(IsFloat(scales.dtype), "input 2 (b_scale) is ", scales.Describe(),
                 "; allowed are float32, float16 and bfloat16");
    node.weights.scales = OneExpert(scales);
  }
  if (const TensorView a_scale = input(Fp8WeightInput::kAScale); a_scale.present)
    node.config.act_scale = LoadFloat(Scalar(a_scale, "input 3 (a_scale)").data, a_scale.dtype, 0);
  return node;
}

MatMulNBitsNode InterpretFp4Weight(const BlockQuantizedAttributes& a,
                                   const std::vector<TensorView>& inputs, DType dtype) {
  const auto input = [&](Fp4WeightInput index) { return inputs[size_t(index)]; };
  const Format& format = GetFormat("nvfp4");
  const int64_t block_size = BlockSize(a, 16);
  const TensorView b = input(Fp4WeightInput::kB), bias = input(Fp4WeightInput::kBias),
                   global_scale = input(Fp4WeightInput::kWeightScale2);
  TensorView scales = input(Fp4WeightInput::kWeightScale);
  if (const TensorView unused = input(Fp4WeightInput::kInputScale); unused.present)
    Scalar(unused, "input 4 (input_scale)");
  if (IsPacked(a.weights_layout, kNoLayouts))
    return TakePacked(format, block_size, a, b, scales, global_scale, bias, dtype);
  MatMulNBitsNode node = TakeStored(format, block_size, a, b, bias, dtype);
  QMOE_REQUIRE(scales.present, "input 2 (weight_scale) is missing; weights need scales");
  QMOE_REQUIRE(scales.dtype == DType::kUint8 || scales.dtype == DType::kFloat8E4M3,
               "input 2 (weight_scale) is ", scales.Describe(),
               "; it must be uint8, the bytes of float8e4m3fn numbers, or float8e4m3fn");
  scales.dtype = DType::kFloat8E4M3;
  node.weights.scales = OneExpert(scales);
  QMOE_REQUIRE(global_scale.present,
               "input 3 (weight_scale_2) is missing; weights need a factor, "
               "float32. Where there is nothing to scale, give one");
  node.weights.global_scale = Scalar(global_scale, "input 3 (weight_scale_2)");
  return node;
}

}  // namespace qmoe_plugin::ort
