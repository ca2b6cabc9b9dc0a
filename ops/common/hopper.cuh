// The instructions of Hopper alone (sm_90a): mbarriers that count arrivals, warpgroup matrix multiplication, and moving registers
// between warpgroups.
#pragma once

#include <cuda.h>

#include "ops/common/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QMOE_HOPPER 1
#endif

namespace qmoe_plugin {

/// Prepares a barrier whose phase ends after `arrivals` arrivals.
__device__ inline void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the asynchronous copies; a __syncthreads follows.
__device__ inline void BarrierInitDone() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives if `condition`: without a branch, which would end what the compiler sees as one stretch of wgmma.
__device__ inline void BarrierArriveIf(uint32_t barrier, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.u32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(uint32_t(condition))
      : "memory");
}

/// Arrives, and tells the barrier that its phase also waits for so many bytes of bulk copies.
__device__ inline void BarrierArriveExpecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Copies the box at (column, row) of a tensor to shared memory in the background, and tells the barrier. Elements beyond the tensor
/// are zero. One thread.
__device__ inline void TensorCopy(uint32_t shared, const CUtensorMap& tensor, int column, int row,
                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(&tensor), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

/// Arrives once all cp.async of this thread so far are done.
__device__ inline void BarrierArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Waits for the end of the phase with this parity.
__device__ inline void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// Orders ordinary accesses of shared memory before those of wgmma.
__device__ inline void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kRegisters>
__device__ void GrowRegisters() {
#ifdef QMOE_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ void ShrinkRegisters() {
#ifdef QMOE_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

/// Before the first wgmma, and after registers that one reads or adds to were written.
__device__ inline void WgmmaFence() {
#ifdef QMOE_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Keeps the compiler from computing operand registers later, among the wgmmas, where they would have to wait for each other.
template <int kRegisters>
__device__ void HoldRegisters(uint32_t (&r)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

__device__ inline void WgmmaCommit() {
#ifdef QMOE_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ void WgmmaWait() {
#ifdef QMOE_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

/// Descriptor of operand B: rows of 64 k (128 bytes) in shared memory, 16-byte chunks swizzled by row mod 8, 1024-byte aligned.
/// Add 2 for each further k16 step.
__device__ inline uint64_t SwizzledOperand(uint32_t address) {
  constexpr uint64_t kEightRows = 1024 >> 4;  // from one group of 8 rows to the next
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | kEightRows << 32 | uint64_t(1) << 16 | (address >> 4 & 0x3fff);
}

// Lists of registers for the inline assembly below.
#define QMOE_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define QMOE_R32 QMOE_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QMOE_R48 QMOE_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QMOE_R64 QMOE_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QMOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QMOE_D16(i) QMOE_D4(i), QMOE_D4(i + 4), QMOE_D4(i + 8), QMOE_D4(i + 12)
#define QMOE_D32 QMOE_D16(0), QMOE_D16(16)
#define QMOE_D48 QMOE_D32, QMOE_D16(32)
#define QMOE_D64 QMOE_D48, QMOE_D16(48)
#define QMOE_WGMMA(n, type, registers, sums, a0, a1, a2, a3, b)                      \
  asm volatile(                                                                      \
      "{.reg .pred add; setp.eq.u32 add, 0, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers \
      "}, "                                                                          \
      "{" a0 "," a1 "," a2 "," a3 "}, " b ", add, 1, 1, 0;}"                         \
      : sums                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_operand))

/// d[64 x kN] += a[64 x 16] b[16 x kN] in float32, by the 4 warps of a warpgroup, in the background. Warp w has rows 16 w to 16 w +
/// 15; it holds a as mma.m16n8k16 does, and d as kN / 8 of that instruction's results one after the other.
template <class T, int kN>
__device__ void Wgmma(float* d, const uint32_t (&a)[4], uint64_t b_operand) {
#ifdef QMOE_HOPPER
#define QMOE_WGMMA_SIZES(type)                                                      \
  if constexpr (kN == 32)                                                           \
    QMOE_WGMMA(32, type, QMOE_R16, QMOE_D16(0), "%16", "%17", "%18", "%19", "%20"); \
  else if constexpr (kN == 64)                                                      \
    QMOE_WGMMA(64, type, QMOE_R32, QMOE_D32, "%32", "%33", "%34", "%35", "%36");    \
  else if constexpr (kN == 96)                                                      \
    QMOE_WGMMA(96, type, QMOE_R48, QMOE_D48, "%48", "%49", "%50", "%51", "%52");    \
  else if constexpr (kN == 128)                                                     \
    QMOE_WGMMA(128, type, QMOE_R64, QMOE_D64, "%64", "%65", "%66", "%67", "%68");   \
  else                                                                              \
    static_assert(kN == 32 || kN == 64 || kN == 96 || kN == 128, "add it above");
  if constexpr (std::is_same_v<T, __half>) {
    QMOE_WGMMA_SIZES("f16")
  } else {
    QMOE_WGMMA_SIZES("bf16")
  }
#undef QMOE_WGMMA_SIZES
#endif
}

#undef QMOE_WGMMA
#undef QMOE_D64
#undef QMOE_D48
#undef QMOE_D32
#undef QMOE_D16
#undef QMOE_D4
#undef QMOE_R64
#undef QMOE_R48
#undef QMOE_R32
#undef QMOE_R16

}  // namespace qmoe_plugin
