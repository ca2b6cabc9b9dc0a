#include "ops/device.h"

#include "ops/common/cuda_host.h"

namespace qmoe_plugin {

bool BuiltWithCuda() { return true; }

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

Device CudaDevice(int index) {
  int count = 0;
  CheckCuda(cudaGetDeviceCount(&count), "looking for CUDA devices");
  QMOE_REQUIRE(index >= 0 && index < count, "there is no CUDA device ", index,
               "; this machine has ", count);
  int major = 0, minor = 0;
  CheckCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
            "asking for the compute capability");
  CheckCuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
            "asking for the compute capability");
  return {.type = DeviceType::kCuda, .index = index, .sm = major * 10 + minor};
}

std::string CudaDeviceName(int index) {
  cudaDeviceProp properties;
  CheckCuda(cudaGetDeviceProperties(&properties, index), "asking for the name of the CUDA device");
  return properties.name;
}

}  // namespace qmoe_plugin
