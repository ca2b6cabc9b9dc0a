#include "ops/matmul_nbits/matmul_nbits.h"

#include "ops/error.h"

namespace qmoe_plugin {

namespace {

PackSource Source(const MatMulConfig& config, const Projection& weights) {
  QMOE_REQUIRE(IsFloat(config.dtype), "A is ", Name(config.dtype),
               "; allowed are float32, float16 and bfloat16");
  QMOE_REQUIRE(config.accuracy_level >= 0 && config.accuracy_level <= 4, "accuracy_level is ",
               config.accuracy_level, "; allowed are 0 to 4");
  const bool packed = weights.packed.present;
  const PackSource source = packed ? PackSource(weights) : PackSource(RowReader(weights));
  const int64_t k = packed ? source.k() : weights.k;  // of the model, before any g_idx
  QMOE_REQUIRE(source.experts() == 1 && source.rows() == config.n && k == config.k, "B holds ",
               source.experts(), " x ", source.rows(), " x ", k, " weights; this node needs 1 x ",
               config.n, " x ", config.k);
  QMOE_REQUIRE(!source.has_sum_scale(), "B was packed with scales of activations");
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
