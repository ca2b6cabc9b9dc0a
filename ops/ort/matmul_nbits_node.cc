#include "ops/ort/matmul_nbits_node.h"

#include "ops/error.h"
#include "ops/ort/packed_node.h"
#include "ops/ort/weight_rules.h"

namespace qmoe_plugin::ort {
namespace {

int64_t Required(const char* attribute, std::optional<int64_t> value, int64_t lowest = 1) {
  QMOE_REQUIRE(value.has_value(), "attribute ", attribute, " is missing; it is required");
  QMOE_REQUIRE(*value >= lowest && *value <= INT32_MAX, "attribute ", attribute, " is ", *value,
               "; it must be from ", lowest, " to 2147483647");
  return *value;
}

/// Whether the global scale is the only one.
bool HasOneScale(const Format& format, int64_t block_size) {
  return format.square_blocks && block_size == 0;
}

/// The tensor as one expert's: [1, N, what is left of each row]. Takes [N, x] and the flat form [N
/// * x].
TensorView ByRow(TensorView tensor, const char* input, int64_t n) {
  if (!tensor.present) return tensor;
  const bool flat = tensor.shape.size() == 1 && tensor.shape[0] > 0 && tensor.shape[0] % n == 0;
  QMOE_REQUIRE(flat || (tensor.shape.size() == 2 && tensor.shape[0] == n), input, " is ",
               tensor.Describe(), "; it must be [N, x] or [N * x] with N = ", n);
  tensor.shape = {1, n, flat ? tensor.shape[0] / n : tensor.shape[1]};
  return tensor;
}

FormatChoice FindFormat(const MatMulNBitsAttributes& a) {
  if (a.weight_format.empty()) {
    const int64_t bits = a.bits.value_or(4);
    QMOE_REQUIRE(bits == 2 || bits == 4 || bits == 8, "bits is ", bits, "; allowed are 2, 4 and 8");
    return {&IntFormat(bits), Concat("bits ", bits)};
  }
  FormatChoice choice = NamedFormat("weight_format", a.weight_format);
  QMOE_REQUIRE(a.bits.value_or(choice.format->bits) == choice.format->bits, "bits is ", *a.bits,
               "; ", choice.says, " has ", choice.format->bits, " bits a weight");
  QMOE_REQUIRE(a.weight_prepacked == 0, "weight_prepacked is ", a.weight_prepacked,
               ", which belongs to the integers that bits says; with ", choice.says,
               " leave it out");
  return choice;
}

void CheckBlockSize(const FormatChoice& choice, int64_t block_size) {
  if (HasOneScale(*choice.format, block_size)) return;
  QMOE_REQUIRE(block_size >= 16 && block_size <= 65536 && (block_size & (block_size - 1)) == 0,
               "block_size is ", block_size, "; it must be a power of two from 16 to 65536",
               choice.format->square_blocks ? ", or 0 for one factor on all weights" : "");
  const int64_t only = choice.format->block_size;
  QMOE_REQUIRE(only == 0 || block_size == only, "block_size is ", block_size, "; ", choice.says,
               " has blocks of ", only);
}

/// Checks the types of scales, and that global scale and codebook are there if the format has them.
void CheckScales(const FormatChoice& choice, int64_t block_size,
                 const std::vector<TensorView>& inputs) {
  const bool one_scale = HasOneScale(*choice.format, block_size);
  const TensorView& scales = inputs[kScales];
  if (one_scale) {
    QMOE_REQUIRE(!scales.present, "input 2 (scales) is ", scales.Describe(), ", but ", choice.says,
                 " with block_size 0 has one factor on all weights, input 7 (global_scale); leave "
                 "it out, or set block_size");
    QMOE_REQUIRE(!inputs[kGroupIndex].present, "input 4 (g_idx) is ",
                 inputs[kGroupIndex].Describe(), ", but with block_size 0 there are no blocks; ",
                 "leave it out");
  } else {
    CheckScaleType(choice, "scales", scales);
  }
  CheckCodebook(choice, "input 6 (codebook)", inputs[kCodebook]);
  const TensorView& global = inputs[kGlobalScale];
  const ScaleKind kind = choice.format->scales;
  const bool needed = NeedsGlobalScale(kind) || one_scale;
  QMOE_REQUIRE(!needed || global.present, "input 7 (global_scale) is missing; ", choice.says,
               " needs a factor, float32 [1]. Where there is nothing to scale, give one");
  QMOE_REQUIRE(needed || kind == ScaleKind::kAny || !global.present, "input 7 (global_scale) is ",
               global.Describe(), ", but ", choice.says, " has no global scale; leave it out");
}

/// What weight_prepacked says, with the raw shape of B in every case.
StoredLayout FindLayout(int64_t weight_prepacked, int64_t n, int64_t k, int64_t bits,
                        int64_t block_size) {
  constexpr StoredLayout kLayouts[] = {StoredLayout::kRaw, StoredLayout::kFpAIntB,
                                       StoredLayout::kFpAIntB90};
  QMOE_REQUIRE(weight_prepacked >= 0 && weight_prepacked <= 2, "weight_prepacked is ",
               weight_prepacked, "; allowed are 0 (raw), 1 (SM80 fpA_intB) and 2 (SM90)");
  const StoredLayout layout = kLayouts[weight_prepacked];
  const std::string refusal =
      layout != StoredLayout::kRaw && k % block_size != 0
          ? Concat("it has no partial blocks, and K is ", k, " and block_size ", block_size)
          : RefuseStoredLayout(layout, n, k, int(bits));
  QMOE_REQUIRE(refusal.empty(), "weight_prepacked is ", weight_prepacked, ", but B cannot be ",
               Name(layout), ": ", refusal,
               ". Export with matmulnbits_weights_prepacked left out, or for the CPU");
  return layout;
}

/// Weights as a model stores them, in one of the layouts of weight_prepacked.
Projection TakeStored(const MatMulNBitsAttributes& a, const std::vector<TensorView>& inputs,
                      const FormatChoice& choice) {
  QMOE_REQUIRE(inputs[kScales].present || HasOneScale(*choice.format, *a.block_size),
               "input 2 (scales) is missing; weights need scales");
  const Format& format = *choice.format;
  const int64_t n = *a.n, k = *a.k, block_size = *a.block_size;
  const StoredLayout layout = FindLayout(a.weight_prepacked, n, k, format.bits, block_size);
  const int64_t block = block_size ? block_size : k, groups = (k + block - 1) / block;
  const std::vector<int64_t> shape{n, groups, block * format.bits / 8};
  TensorView codes = inputs[kB];
  QMOE_REQUIRE(codes.shape == shape, "B is ", codes.Describe(), "; with N=", n, ", K=", k,
               ", bits=", format.bits, " and block_size=", block_size, " it must be uint8[",
               shape[0], ", ", shape[1], ", ", shape[2], "]");
  codes.shape = {1, n, groups * shape[2]};
  TensorView bias = inputs[kBias];
  if (bias.present) {
    QMOE_REQUIRE(bias.shape == std::vector<int64_t>{n}, "bias is ", bias.Describe(),
                 "; it must be [", n, "] = [N]");
    bias.shape = {1, n};
  }
  CheckScales(choice, block_size, inputs);

  Projection p;
  p.name = std::string("B");
  p.format = &format;
  p.experts = 1;
  p.n = n;
  p.k = k;
  p.block_size = block_size;
  p.scale_rows = format.square_blocks && block_size ? block_size : 1;
  p.layout = layout;
  p.codes = codes;
  p.scales = ByRow(inputs[kScales], "scales", (n + p.scale_rows - 1) / p.scale_rows);
  p.scales_are_e8m0 = format.scales == ScaleKind::kE8M0;
  p.zero_points = ByRow(inputs[kZeroPoints], "zero_points", n);
  p.bias = bias;
  p.group_index = inputs[kGroupIndex];
  p.codebook = inputs[kCodebook];
  p.global_scale = inputs[kGlobalScale];
  return p;
}

/// Weights that were packed before. MakeMatMulNBits checks their sizes.
Projection TakePacked(const MatMulNBitsAttributes& a, const std::vector<TensorView>& inputs,
                      const Format& format) {
  QMOE_REQUIRE(a.weight_prepacked == 0,
               "weights_layout is \"packed\", but weight_prepacked=", a.weight_prepacked,
               " is given too; leave it out");
  Projection p = PackedProjection("B", inputs[kB], format, *a.block_size);
  p.scales = inputs[kScales];  // this and the following must be left out
  p.zero_points = inputs[kZeroPoints];
  p.group_index = inputs[kGroupIndex];
  p.bias = inputs[kBias];
  p.codebook = inputs[kCodebook];
  p.global_scale = inputs[kGlobalScale];
  return p;
}

}  // namespace

MatMulNBitsAttributes ReadMatMulNBitsAttributes(const Attributes& node) {
  MatMulNBitsAttributes a;
  a.k = node.FindInt("K");
  a.n = node.FindInt("N");
  a.block_size = node.FindInt("block_size");
  a.bits = node.FindInt("bits");
  a.weight_format = node.String("weight_format", a.weight_format);
  a.accuracy_level = node.Int("accuracy_level", a.accuracy_level);
  a.weight_prepacked = node.Int("weight_prepacked", a.weight_prepacked);
  a.weights_layout = node.String("weights_layout", a.weights_layout);
  return a;
}

MatMulNBitsNode InterpretMatMulNBits(const MatMulNBitsAttributes& a,
                                     const std::vector<TensorView>& inputs, DType dtype) {
  const int64_t k = Required("K", a.k), n = Required("N", a.n),
                block_size = Required("block_size", a.block_size, 0);
  const FormatChoice choice = FindFormat(a);
  CheckBlockSize(choice, block_size);
  QMOE_REQUIRE(a.accuracy_level >= 0 && a.accuracy_level <= 4, "accuracy_level is ",
               a.accuracy_level, "; allowed are 0 to 4");
  const bool packed = IsPacked(a.weights_layout, "Other layouts are named by weight_prepacked");
  MatMulNBitsNode node;
  node.config.dtype = dtype;
  node.config.n = n;
  node.config.k = k;
  node.config.accuracy_level = AccuracyLevel(a.accuracy_level);
  node.weights = packed ? TakePacked(a, inputs, *choice.format) : TakeStored(a, inputs, choice);
  return node;
}

}  // namespace qmoe_plugin::ort
