#include "ops/device.h"

#include "ops/error.h"

namespace qmoe_plugin {

std::string Device::Describe() const {
  return type == DeviceType::kCpu ? "the CPU" : Concat("CUDA device ", index, " (sm_", sm, ")");
}

}  // namespace qmoe_plugin
