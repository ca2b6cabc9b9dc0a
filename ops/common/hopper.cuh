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

/// Copies `bytes`, a multiple of 16, of global memory to shared memory in the background, and tells the barrier. One thread.
__device__ inline void BulkCopy(uint32_t shared, const void* from, uint32_t bytes,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(barrier)
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

/// Stores four 8 x 8 matrices of 16-bit values, transposed: a lane holds row lane / 4, columns 2 (lane mod 4) and the next of each, and
/// gives the address where 16 bytes, a column, of matrix lane / 8 go.
__device__ inline void StoreMatrix4Transposed(uint32_t shared_column, const uint32_t (&r)[4]) {
#ifdef QMOE_HOPPER
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_column),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#endif
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

/// Keeps the compiler from knowing that a value stays the same, and so from computing ahead what there are no registers for.
__device__ inline void Renew(float& value) { asm volatile("" : "+f"(value)); }
__device__ inline void Renew(int& value) { asm volatile("" : "+r"(value)); }

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

// Lists of registers for the inline assembly below: %0 to %15, to %31, ...
#define QMOE_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define QMOE_R24 QMOE_R16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define QMOE_R32 QMOE_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QMOE_R40 QMOE_R32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define QMOE_R48 QMOE_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QMOE_R64 QMOE_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QMOE_R80 QMOE_R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define QMOE_R96 QMOE_R80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QMOE_R112 \
  QMOE_R96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define QMOE_R128 \
  QMOE_R112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QMOE_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QMOE_SUMS8(i) QMOE_SUMS4(i), QMOE_SUMS4(i + 4)
#define QMOE_SUMS16(i) QMOE_SUMS4(i), QMOE_SUMS4(i + 4), QMOE_SUMS4(i + 8), QMOE_SUMS4(i + 12)
#define QMOE_D16 QMOE_SUMS16(0)
#define QMOE_D24 QMOE_D16, QMOE_SUMS8(16)
#define QMOE_D32 QMOE_D16, QMOE_SUMS16(16)
#define QMOE_D40 QMOE_D32, QMOE_SUMS8(32)
#define QMOE_D48 QMOE_D32, QMOE_SUMS16(32)
#define QMOE_D64 QMOE_D48, QMOE_SUMS16(48)
#define QMOE_D80 QMOE_D64, QMOE_SUMS16(64)
#define QMOE_D96 QMOE_D80, QMOE_SUMS16(80)
#define QMOE_D112 QMOE_D96, QMOE_SUMS16(96)
#define QMOE_D128 QMOE_D112, QMOE_SUMS16(112)
// kN = 2 * sums; operand A is in the five registers behind the sums.
#define QMOE_WGMMA(n, sums, a0, a1, a2, a3, b, type)                                    \
  if constexpr (kN == n)                                                                \
  asm volatile(                                                                         \
      "{.reg .pred add; setp.eq.u32 add, 0, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" QMOE_R##sums \
      "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", add, 1, 1, 0;}"               \
      : QMOE_D##sums                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_operand))
#define QMOE_WGMMA_SIZES(type)                    \
  QMOE_WGMMA(32, 16, 16, 17, 18, 19, 20, type);   \
  QMOE_WGMMA(48, 24, 24, 25, 26, 27, 28, type);   \
  QMOE_WGMMA(64, 32, 32, 33, 34, 35, 36, type);   \
  QMOE_WGMMA(80, 40, 40, 41, 42, 43, 44, type);   \
  QMOE_WGMMA(96, 48, 48, 49, 50, 51, 52, type);   \
  QMOE_WGMMA(128, 64, 64, 65, 66, 67, 68, type);  \
  QMOE_WGMMA(160, 80, 80, 81, 82, 83, 84, type);  \
  QMOE_WGMMA(192, 96, 96, 97, 98, 99, 100, type); \
  QMOE_WGMMA(256, 128, 128, 129, 130, 131, 132, type);

/// d[64 x kN] += a[64 x 16] b[16 x kN] in float32, by the 4 warps of a warpgroup, in the background. Warp w has rows 16 w to 16 w +
/// 15; it holds a as mma.m16n8k16 does, and d as kN / 8 of that instruction's results one after the other.
template <class T, int kN>
__device__ void Wgmma(float* d, const uint32_t (&a)[4], uint64_t b_operand) {
  static_assert(kN % 16 == 0 && kN <= 256, "add it above");
#ifdef QMOE_HOPPER
  if constexpr (std::is_same_v<T, __half>) {
    QMOE_WGMMA_SIZES("f16")
  } else {
    QMOE_WGMMA_SIZES("bf16")
  }
#endif
}

#undef QMOE_WGMMA_SIZES
#undef QMOE_WGMMA
#undef QMOE_D128
#undef QMOE_D112
#undef QMOE_D96
#undef QMOE_D80
#undef QMOE_D64
#undef QMOE_D48
#undef QMOE_D40
#undef QMOE_D32
#undef QMOE_D24
#undef QMOE_D16
#undef QMOE_SUMS16
#undef QMOE_SUMS8
#undef QMOE_SUMS4
#undef QMOE_R128
#undef QMOE_R112
#undef QMOE_R96
#undef QMOE_R80
#undef QMOE_R64
#undef QMOE_R48
#undef QMOE_R40
#undef QMOE_R32
#undef QMOE_R24
#undef QMOE_R16

}  // namespace qmoe_plugin
