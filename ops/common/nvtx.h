// Ranges that profilers show (NVTX), around the launches of a kernel. Off unless QMOE_PLUGIN_NVTX is
// set: a launch then costs one test of a constant.
//
// A range is open while the host launches. Replays of a CUDA graph launch nothing, so profile runs
// without one, or the run that captures it.
#pragma once

#include <string>

namespace qmoe_plugin {

/// Whether QMOE_PLUGIN_NVTX is set. Throws Error if this build has no NVTX.
bool NvtxEnabled();

/// Opens a range of the domain "qmoe_plugin" in this thread, and closes it.
void NvtxPush(const std::string& name);
void NvtxPop();

/// A range from here to the end of the scope, if they are on: "<stage> <kernel>".
class NvtxRange {
 public:
  NvtxRange(const char* stage, const std::string& kernel) : open_(NvtxEnabled()) {
    if (open_) [[unlikely]]
      NvtxPush(std::string(stage) + " " + kernel);
  }
  ~NvtxRange() {
    if (open_) [[unlikely]]
      NvtxPop();
  }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;

 private:
  bool open_;
};

}  // namespace qmoe_plugin
