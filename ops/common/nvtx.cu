// NVTX version 3 is headers of the CUDA toolkit only: they load what the profiler names to them, and
// do nothing without one.
#include "ops/common/nvtx.h"

#include <cstdlib>

#include "ops/error.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define QMOE_NVTX 1
#else
#define QMOE_NVTX 0
#endif

namespace qmoe_plugin {
namespace {

bool IsSet() {
  const char* value = std::getenv("QMOE_PLUGIN_NVTX");
  return value != nullptr && *value != '\0';
}

#if QMOE_NVTX
nvtxDomainHandle_t Domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("qmoe_plugin");
  return domain;
}
#endif

}  // namespace

bool NvtxEnabled() {
  static const bool set = IsSet();
  if (set && !QMOE_NVTX)
    FailUnsupported(
        "QMOE_PLUGIN_NVTX is set, but this build of qmoe_plugin has no NVTX: the CUDA toolkit that "
        "built it had no nvtx3/nvToolsExt.h. Unset it, or build with a toolkit that has it");
  return set;
}

#if QMOE_NVTX
void NvtxPush(const std::string& name) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name.c_str();
  nvtxDomainRangePushEx(Domain(), &attributes);
}

void NvtxPop() { nvtxDomainRangePop(Domain()); }
#else
void NvtxPush(const std::string&) {}
void NvtxPop() {}
#endif

}  // namespace qmoe_plugin
