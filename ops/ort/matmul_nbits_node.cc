#include "ops/ort/matmul_nbits_node.h"

#include "ops/error.h"
#include "ops/ort/int_format.h"

namespace qmoe_plugin::ort {
namespace {

int64_t Required(const char* attribute, std::optional<int64_t> value) {
  QMOE_REQUIRE(value.has_value(), "attribute ", attribute, " is missing; it is required");
  QMOE_REQUIRE(*value > 0 && *value <= INT32_MAX, "attribute ", attribute, " is ", *value,
               "; it must be from 1 to 2147483647");
  return *value;
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

}  // namespace

MatMulNBitsNode InterpretMatMulNBits(const MatMulNBitsAttributes& a,
                                     const std::vector<TensorView>& inputs, DType dtype) {
  const int64_t k = Required("K", a.k), n = Required("N", a.n),
                block_size = Required("block_size", a.block_size);
  QMOE_REQUIRE(a.bits == 2 || a.bits == 4 || a.bits == 8, "bits is ", a.bits,
               "; allowed are 2, 4 and 8");
  QMOE_REQUIRE(block_size >= 16 && block_size <= 65536 && (block_size & (block_size - 1)) == 0,
               "block_size is ", block_size, "; it must be a power of two from 16 to 65536");
  QMOE_REQUIRE(a.accuracy_level >= 0 && a.accuracy_level <= 4, "accuracy_level is ",
               a.accuracy_level, "; allowed are 0 to 4");
  const StoredLayout layout = FindLayout(a.weight_prepacked, n, k, a.bits, block_size);
  const int64_t groups = (k + block_size - 1) / block_size;
  const std::vector<int64_t> shape{n, groups, block_size * a.bits / 8};
  TensorView codes = inputs[kB];
  QMOE_REQUIRE(codes.shape == shape, "B is ", codes.Describe(), "; with N=", n, ", K=", k,
               ", bits=", a.bits, " and block_size=", block_size, " it must be uint8[", shape[0],
               ", ", shape[1], ", ", shape[2], "]");
  codes.shape = {1, n, groups * shape[2]};
  TensorView bias = inputs[kBias];
  if (bias.present) {
    QMOE_REQUIRE(bias.shape == std::vector<int64_t>{n}, "bias is ", bias.Describe(),
                 "; it must be [", n, "] = [N]");
    bias.shape = {1, n};
  }

  MatMulNBitsNode node;
  node.config.dtype = dtype;
  node.config.n = n;
  node.config.k = k;
  node.config.accuracy_level = AccuracyLevel(a.accuracy_level);
  node.weights.name = std::string("B");
  node.weights.format = &IntFormat(int(a.bits));
  node.weights.experts = 1;
  node.weights.n = n;
  node.weights.k = k;
  node.weights.block_size = block_size;
  node.weights.layout = layout;
  node.weights.codes = codes;
  node.weights.scales = ByRow(inputs[kScales], "scales", n);
  node.weights.zero_points = ByRow(inputs[kZeroPoints], "zero_points", n);
  node.weights.bias = bias;
  node.weights.group_index = inputs[kGroupIndex];
  return node;
}

}  // namespace qmoe_plugin::ort
