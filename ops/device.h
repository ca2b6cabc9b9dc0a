// Where kernels run.
#pragma once

#include <string>

namespace qmoe_plugin {

enum class DeviceType { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  // CUDA device number
  int sm = 0;     // compute capability, major * 10 + minor (90 = Hopper); 0 for the CPU

  std::string Describe() const;  // "CPU" or "CUDA device 0 (sm_90)"
};

/// The CUDA device `index`; throws Error when the library was built without CUDA or the driver
/// refuses.
Device CudaDevice(int index);

/// What the driver calls it, as in "NVIDIA H200". Throws Error as above.
std::string CudaDeviceName(int index);

/// Number of CUDA devices; 0 when there is no driver or the library was built without CUDA. Never
/// throws.
int CudaDeviceCount();

/// Whether the CUDA kernels were compiled in.
bool BuiltWithCuda();

}  // namespace qmoe_plugin
