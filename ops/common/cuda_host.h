// Host side of CUDA: errors, the current device, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "ops/error.h"

namespace qmoe_plugin {

/// Throws Error if `status` is a failure; `what` says what was tried.
inline void CheckCuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // forget it, so that nobody else trips over it
  FailRuntime(what, " failed: ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

/// Makes `device` the current one of this thread, and the earlier one again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : device_(device) {
    CheckCuda(cudaGetDevice(&previous_), "asking for the current CUDA device");
    if (previous_ != device_) CheckCuda(cudaSetDevice(device_), "selecting the CUDA device");
  }
  ~DeviceScope() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int device_, previous_ = 0;
};

/// Lets this thread allocate, copy and free while another one captures a CUDA graph: such calls
/// have nothing to do with that capture, but would break it by default.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Memory on a device, freed with the last copy of the pointer. `what` is for the message if there
/// is not enough.
std::shared_ptr<uint8_t> AllocateOnDevice(int device, size_t bytes, const std::string& what);

/// Copies to device memory and waits. May be called on any thread, also while others capture.
void CopyToDevice(int device, void* target, const void* source, size_t bytes);

/// Loads a kernel into the current device's context, so that no run (and no capture) has to, and
/// allows it that much dynamic shared memory. Throws Error if this build has no code for the
/// device.
void PrepareKernel(const char* name, const void* kernel, size_t shared_bytes = 0);

/// Whether a kernel may start before the one in front of it in the stream has ended. It must call WaitForPrevious
/// (ops/common/ptx.cuh) before it reads what that one writes, in at least one thread of every block.
enum class Overlap { kNone, kPrevious };

/// What this device and driver can, also in captured graphs.
Overlap OverlapOn(int sm);

/// Launches `kernel` and throws Error if that fails. Not for zero blocks.
template <class... Params, class... Args>
void Launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads,
            size_t shared_bytes, Overlap overlap, cudaStream_t stream, Args&&... args) {
  if (blocks > INT32_MAX)
    FailUnsupported(name, " would need ", blocks, " thread blocks; split the input");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap == Overlap::kPrevious ? 1 : 0;
  CheckCuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

template <class... Params, class... Args>
void Launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  Launch(name, kernel, blocks, threads, shared_bytes, Overlap::kNone, stream,
         std::forward<Args>(args)...);
}

}  // namespace qmoe_plugin
