#include "ops/matmul_nbits/matmul_nbits.h"

#include "ops/error.h"

namespace qmoe_plugin {

std::unique_ptr<MatMulNBits> MakeMatMulNBits(const Device& device, const MatMulConfig& config,
                                             const Projection& weights) {
  QMOE_REQUIRE(IsFloat(config.dtype), "A is ", Name(config.dtype),
               "; allowed are float32, float16 and bfloat16");
  QMOE_REQUIRE(config.accuracy_level >= 0 && config.accuracy_level <= 4, "accuracy_level is ",
               config.accuracy_level, "; allowed are 0 to 4");
  QMOE_REQUIRE(weights.experts == 1 && weights.n == config.n && weights.k == config.k, "B holds ",
               weights.experts, " x ", weights.n, " x ", weights.k,
               " weights; this node needs 1 x ", config.n, " x ", config.k);
  const RowReader reader(weights);
  if (device.type == DeviceType::kCpu) return MakeCpuMatMulNBits(config, reader);
  return MakeCudaMatMulNBits(device, config, reader);
}

}  // namespace qmoe_plugin
