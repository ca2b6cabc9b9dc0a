// Stands in for ops/common/hopper.cuh: the same functions, on the CPU. What they do is said there.
#pragma once

#include <cuda.h>

#include <array>

#include "ops/common/ptx.cuh"

#define QMOE_HOPPER 1

namespace emulator {

/// Of the mbarrier at an address of shared memory.
void InitBarrier(uint32_t barrier, int arrivals);
void Arrive(uint32_t barrier, uint32_t expected_bytes);
void ArriveAfterCopies(uint32_t barrier);
void Wait(uint32_t barrier, uint32_t parity);
void CopyBytes(uint32_t shared, const void* from, uint32_t bytes, uint32_t barrier);
void CopyBox(uint32_t shared, const CUtensorMap& tensor, int column, int row, uint32_t barrier);

/// This thread's warpgroup products.
Groups& ProductsOfThread();

inline char* Swizzled(uint32_t address, size_t bytes) {
  return SharedPointer(address ^ (address >> 7 & 7) << 4, bytes);
}

}  // namespace emulator

namespace qmoe_plugin {

inline void BarrierInit(uint32_t barrier, int arrivals) {
  emulator::InitBarrier(barrier, arrivals);
}
inline void BarrierInitDone() {}
inline void BarrierArrive(uint32_t barrier) { emulator::Arrive(barrier, 0); }
inline void BarrierArriveIf(uint32_t barrier, bool condition) {
  if (condition) emulator::Arrive(barrier, 0);
}
inline void BarrierArriveExpecting(uint32_t barrier, uint32_t bytes) {
  emulator::Arrive(barrier, bytes);
}
inline void TensorCopy(uint32_t shared, const CUtensorMap& tensor, int column, int row,
                       uint32_t barrier) {
  emulator::CopyBox(shared, tensor, column, row, barrier);
}
inline void BulkCopy(uint32_t shared, const void* from, uint32_t bytes, uint32_t barrier) {
  emulator::CopyBytes(shared, from, bytes, barrier);
}
inline void BarrierArriveAfterCopies(uint32_t barrier) { emulator::ArriveAfterCopies(barrier); }
inline void BarrierWait(uint32_t barrier, uint32_t parity) { emulator::Wait(barrier, parity); }
inline void FenceAsyncProxy() {}
inline void StoreMatrix4Transposed(uint32_t shared_column, const uint32_t (&r)[4]) {
  struct Operands {
    uint32_t column, r[4];
  };
  const unsigned lane = threadIdx.x % 32;
  const Operands mine{shared_column, {r[0], r[1], r[2], r[3]}};
  emulator::OnWarp("stmatrix", 0xffffffff, mine, [&](const Operands* all) {
    char* to = emulator::SharedPointer(all[lane].column, 16);  // column lane % 8 of matrix lane / 8
    for (unsigned row = 0; row < 8; ++row) {
      const uint32_t pair = all[4 * row + lane % 8 / 2].r[lane / 8];
      const auto value = uint16_t(pair >> (16 * (lane % 2)));
      std::memcpy(to + 2 * row, &value, 2);
    }
    return 0;
  });
}

template <int kRegisters>
void GrowRegisters() {}
template <int kRegisters>
void ShrinkRegisters() {}
inline void WgmmaFence() {}
template <int kRegisters>
void HoldRegisters(uint32_t (&)[kRegisters]) {}
inline void Renew(float&) {}
inline void Renew(int&) {}

inline void WgmmaCommit() { emulator::ProductsOfThread().Commit(); }

template <int kPending>
void WgmmaWait() {
  emulator::ProductsOfThread().Wait(size_t(kPending));
}

/// The shared address that begins the operand; SwizzledOperand of the real file puts it into a descriptor.
inline uint64_t SwizzledOperand(uint32_t address) {
  if (address % 1024 != 0) emulator::Fail("operand B is not 1024-byte aligned");
  return address >> 4;
}

template <class T, int kN>
void Wgmma(float* d, const uint32_t (&a)[4], uint64_t b_operand) {
  struct Operand {
    uint32_t a[4];
  };
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float rows[2][16];  // of a: g and g + 8
  emulator::OnWarp("wgmma", 0xffffffff, Operand{{a[0], a[1], a[2], a[3]}}, [&](const Operand* all) {
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned k = 0; k < 16; ++k)
        rows[i][k] = emulator::Value<T>(all[4 * g + k % 8 / 2].a[i + k / 8 * 2], k % 2);
    return 0;
  });
  std::array<float, 32> left;
  std::copy_n(rows[0], 32, left.begin());
  // Reads b as late as the hardware may, so that a stage that is given back too early shows.
  emulator::ProductsOfThread().Add([=] {
    for (unsigned n = 0; n < unsigned(kN); ++n) {
      if (n % 8 / 2 != t) continue;
      const uint32_t row = uint32_t(b_operand << 4) + n / 8 * 1024 + n % 8 * 128;
      for (unsigned k = 0; k < 16; ++k) {
        T value;
        std::memcpy(&value.bits, emulator::Swizzled(row + k * 2, 2), 2);
        d[n / 8 * 4 + n % 2] += left[k] * float(value);
        d[n / 8 * 4 + 2 + n % 2] += left[16 + k] * float(value);
      }
    }
  });
}

}  // namespace qmoe_plugin
