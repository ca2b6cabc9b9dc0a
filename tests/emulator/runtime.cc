// The CUDA runtime's host side on the CPU.
#include <cstdlib>
#include <map>

#include "cudaTypedefs.h"
#include "cuda_runtime.h"

namespace emulator {

Gpu gpu{90, 132, size_t(227) << 10};
int launches = 0;

namespace {

std::map<const void*, size_t>& Allowed() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                     const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                     const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2 : 8;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const bool valid = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                     strides[0] % 16 == 0 && sizes[0] > 0 && sizes[1] > 0 && box[0] > 0 &&
                     box[0] <= 256 && box[1] > 0 && box[1] <= 256 && box[0] * bytes % 16 == 0 &&
                     (!swizzled || box[0] * bytes <= 128);
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(data),
          sizes[0],
          sizes[1],
          strides[0],
          box[0],
          box[1],
          bytes,
          swizzled};
  return CUDA_SUCCESS;
}

}  // namespace

void AllowShared(const void* kernel, size_t bytes) { Allowed()[kernel] = bytes; }

size_t AllowedShared(const void* kernel) {
  const auto found = Allowed().find(kernel);
  return found == Allowed().end() ? size_t(48) << 10 : found->second;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated GPU"; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? emulator::gpu.sm / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? emulator::gpu.sm % 10
                                                            : emulator::gpu.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated GPU"};
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, bytes);  // ends where it must, for AddressSanitizer
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = nullptr, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (size_t(bytes) > emulator::gpu.shared_limit) return cudaErrorInvalidValue;
  return emulator::AllowShared(kernel, size_t(bytes)), cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&emulator::EncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
