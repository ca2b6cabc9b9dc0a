// Stands in for all CUDA code in a library that is built without it.
#include "ops/error.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/qmoe/qmoe.h"

namespace qmoe_plugin {
namespace {

[[noreturn]] void FailWithoutCuda() {
  FailUnsupported(
      "this qmoe_plugin library was built without CUDA; install nvcc 12.8 or newer and rebuild "
      "with "
      "QMOE_PLUGIN_CUDA=ON, or run the model on the CPU");
}

}  // namespace

bool BuiltWithCuda() { return false; }
int CudaDeviceCount() { return 0; }
Device CudaDevice(int) { FailWithoutCuda(); }
std::string CudaDeviceName(int) { FailWithoutCuda(); }

std::unique_ptr<QMoe> MakeCudaQMoe(const Device&, const MoeConfig&, const PackSource&,
                                   const PackSource&) {
  FailWithoutCuda();
}

std::unique_ptr<MatMulNBits> MakeCudaMatMulNBits(const Device&, const MatMulConfig&,
                                                 const PackSource&) {
  FailWithoutCuda();
}

}  // namespace qmoe_plugin
