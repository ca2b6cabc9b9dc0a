// As much of the CUDA runtime and of CUDA C++ as our sources use; see README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "scheduler.h"

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::isnan;
using std::max;
using std::min;
inline unsigned min(unsigned x, int y) { return std::min(x, unsigned(y)); }
inline unsigned min(int x, unsigned y) { return std::min(unsigned(x), y); }

// --- the runtime's host side: one device of an SM that tests choose, its memory the CPU's ---------------------------------------------

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
struct cudaDeviceProp {
  char name[256];
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
enum { cudaStreamNonBlocking };
struct EmulatedStream;
using cudaStream_t = EmulatedStream*;
struct cudaFuncAttributes {};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {
/// The device that sources see from now on.
struct Gpu {
  int sm, multiprocessors;
  size_t shared_limit;  // bytes of a block
};
extern Gpu gpu;
extern int launches;  // so far
/// Allows a kernel that much dynamic shared memory; and what it was allowed.
void AllowShared(const void* kernel, size_t bytes);
size_t AllowedShared(const void* kernel);
}  // namespace emulator

const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult*);

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const size_t allowed = emulator::AllowedShared(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  ++emulator::launches;
  emulator::RunGrid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                    [&] { kernel(args...); });
  return cudaSuccess;
}

// --- device functions -----------------------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::Synchronize(0, 0); }

namespace emulator {
/// An instruction of all lanes in `mask`: result(all), of what each gives. `what` must be the same for all.
template <class T, class Result>
auto OnWarp(const char* what, uint32_t mask, const T& mine, const Result& result) {
  static_assert(sizeof(T) <= kLaneBytes);
  Exchange& warp = WarpExchange();
  const unsigned lane = threadIdx.x % 32;
  if (!(mask >> lane & 1)) Fail(std::string(what) + " by a lane that is not in its mask");
  WaitUntil("the other lanes to leave a warp instruction", [&] { return warp.leaving == 0; });
  if (warp.arrived == 0) warp.what = what;
  if (std::strcmp(warp.what, what) != 0)
    Fail(std::string("lanes of a warp run different instructions: ") + warp.what + " and " + what);
  std::memcpy(warp.lanes[lane], &mine, sizeof mine);
  warp.arrived |= 1u << lane;
  WaitUntil(what, [&] { return warp.leaving != 0 || warp.arrived == mask; });
  if (warp.leaving == 0) warp.leaving = mask;
  T all[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], warp.lanes[i], sizeof(T));
  warp.leaving &= ~(1u << lane);
  if (warp.leaving == 0) warp.arrived = 0;
  return result(all);
}
}  // namespace emulator

inline void __threadfence() {}  // threads run one after the other
inline void __syncwarp(uint32_t mask = 0xffffffff) {
  emulator::OnWarp("__syncwarp", mask, 0, [](const int*) { return 0; });
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return emulator::OnWarp("__shfl_sync", mask, value, [&](const T* all) { return all[lane & 31]; });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  const int from = int(threadIdx.x % 32) ^ bits;
  return emulator::OnWarp("__shfl_xor_sync", mask, value, [&](const T* all) { return all[from]; });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by) {
  const int lane = int(threadIdx.x % 32), from = lane >= by ? lane - by : lane;
  return emulator::OnWarp("__shfl_up_sync", mask, value, [&](const T* all) { return all[from]; });
}
inline unsigned __ballot_sync(uint32_t mask, bool vote) {
  return emulator::OnWarp("__ballot_sync", mask, vote, [&](const bool* all) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(mask >> i & 1 && all[i]) << i;
    return votes;
  });
}
namespace emulator {
template <class T, class Fold>
T Reduce(const char* what, uint32_t mask, T value, const Fold& fold) {
  return OnWarp(what, mask, value, [&](const T* all) {
    T folded = value;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && unsigned(i) != threadIdx.x % 32) folded = fold(folded, all[i]);
    return folded;
  });
}
}  // namespace emulator
template <class T>
T __reduce_add_sync(uint32_t mask, T value) {
  return emulator::Reduce("__reduce_add_sync", mask, value, std::plus<T>());
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value) {
  return emulator::Reduce("__reduce_max_sync", mask, value,
                          [](T x, T y) { return std::max(x, y); });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value) {
  return emulator::Reduce("__reduce_min_sync", mask, value,
                          [](T x, T y) { return std::min(x, y); });
}

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at |= value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
