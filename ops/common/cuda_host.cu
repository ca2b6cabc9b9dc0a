#include "ops/common/cuda_host.h"

namespace qmoe_plugin {

std::shared_ptr<uint8_t> AllocateOnDevice(int device, size_t bytes, const std::string& what) {
  const DeviceScope scope(device);
  const OutsideCapture outside;
  void* memory = nullptr;
  if (const cudaError_t status = cudaMalloc(&memory, bytes); status != cudaSuccess) {
    cudaGetLastError();
    FailRuntime("cannot allocate ", bytes, " bytes on CUDA device ", device, " for ", what, ": ",
                cudaGetErrorString(status));
  }
  return {static_cast<uint8_t*>(memory), [device](uint8_t* p) noexcept {
            // At process exit the driver may be gone already; then so is the memory.
            int previous = device;
            const OutsideCapture outside;
            cudaGetDevice(&previous);
            if (previous != device && cudaSetDevice(device) != cudaSuccess) return;
            cudaFree(p);
            if (previous != device) cudaSetDevice(previous);
            cudaGetLastError();
          }};
}

void CopyToDevice(int device, void* target, const void* source, size_t bytes) {
  const DeviceScope scope(device);
  const OutsideCapture outside;
  // Not on the default stream: that one would wait for, and break, captures elsewhere.
  cudaStream_t stream;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a CUDA stream");
  cudaError_t status = cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  CheckCuda(status, "copying weights to the GPU");
}

Overlap OverlapOn(int sm) {
  constexpr int kFirstDriver = 12030;  // older ones cannot capture such launches
  static const int driver = [] {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
  }();
  return sm >= 90 && driver >= kFirstDriver ? Overlap::kPrevious : Overlap::kNone;
}

void PrepareKernel(const char* name, const void* kernel, size_t shared_bytes) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    FailUnsupported("this qmoe_plugin library has no code for this GPU (", name,
                    "); it was built for the CUDA architectures ", QMOE_PLUGIN_CUDA_ARCHS,
                    "; rebuild it with the GPU's in QMOE_PLUGIN_CUDA_ARCHS");
  }
  CheckCuda(status, name);
  if (shared_bytes > size_t(48) << 10)
    CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared_bytes)),
              name);
}

}  // namespace qmoe_plugin
