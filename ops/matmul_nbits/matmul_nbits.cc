#include "ops/matmul_nbits/matmul_nbits.h"

#include <cmath>

#include "ops/error.h"

namespace qmoe_plugin {

namespace {

/// The weights with the scale of A, which the config owns, as a factor on their sums.
Projection WithActivationScale(const Projection& weights, const MatMulConfig& config) {
  Projection scaled = weights;
  if (config.act_scale) scaled.sum_scale = {&*config.act_scale, DType::kFloat32, {1}, true};
  return scaled;
}

PackSource Source(const MatMulConfig& config, const Projection& weights) {
  QMOE_REQUIRE(IsFloat(config.dtype), "A is ", Name(config.dtype),
               "; allowed are float32, float16 and bfloat16");
  QMOE_REQUIRE(config.accuracy_level >= 0 && config.accuracy_level <= 4, "accuracy_level is ",
               config.accuracy_level, "; allowed are 0 to 4");
  const bool packed = weights.packed.present;
  QMOE_REQUIRE(!config.act_scale || (*config.act_scale > 0 && std::isfinite(*config.act_scale)),
               "the scale of activations is ", config.act_scale.value_or(0),
               "; it must be positive and finite");
  const PackSource source =
      packed ? PackSource(weights) : PackSource(RowReader(WithActivationScale(weights, config)));
  const int64_t k = packed ? source.k() : weights.k;  // of the model, before any g_idx
  QMOE_REQUIRE(source.experts() == 1 && source.rows() == config.n && k == config.k, "B holds ",
               source.experts(), " x ", source.rows(), " x ", k, " weights; this node needs 1 x ",
               config.n, " x ", config.k);
  QMOE_REQUIRE(!config.act_scale || source.k_order().empty(),
               "a g_idx and a scale of activations do not go together");
  QMOE_REQUIRE(source.has_sum_scale() == config.act_scale.has_value(), "B was packed ",
               source.has_sum_scale() ? "with" : "without",
               " a scale of activations, unlike what this node has; prepack the model again");
  return source;
}

}  // namespace

std::unique_ptr<MatMulNBits> MakeMatMulNBits(const Device& device, const MatMulConfig& config,
                                             const Projection& weights) {
  const PackSource source = Source(config, weights);
  if (device.type == DeviceType::kCpu) return MakeCpuMatMulNBits(config, source);
  return MakeCudaMatMulNBits(device, config, source);
}

void PrepackMatMulNBits(const Device& device, const MatMulConfig& config, const Projection& weights,
                        const AllocatePacked& allocate) {
  Source(config, weights).Prepack("B", false, TargetOf(device, config.dtype), allocate);
}

}  // namespace qmoe_plugin
