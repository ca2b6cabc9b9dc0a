// Stands in for ops/common/ptx.cuh: the same functions, on the CPU. What they do is said there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include <vector>

namespace emulator {

/// Asynchronous work of a thread, in groups: done when the thread waits for its group.
class Groups {
 public:
  void Add(std::function<void()> work) {
    ++open_;
    pending_.push_back(std::move(work));
  }
  void Commit() { groups_.push_back(std::exchange(open_, 0)); }
  /// Does the oldest groups, until at most so many are left.
  void Wait(size_t left) {
    while (groups_.size() > left) {
      const auto end = pending_.begin() + ptrdiff_t(groups_.front());
      for (auto work = pending_.begin(); work != end; ++work) (*work)();
      pending_.erase(pending_.begin(), end);
      groups_.erase(groups_.begin());
    }
  }
  bool empty() const { return pending_.empty(); }
  /// All that is pending, which is forgotten.
  std::vector<std::function<void()>> Take() { return std::exchange(*this, {}).pending_; }

 private:
  std::vector<std::function<void()>> pending_;
  std::vector<size_t> groups_;  // pieces of work in each committed group, oldest first
  size_t open_ = 0;             // pieces that belong to no group yet
};

/// This thread's cp.async.
Groups& CopiesOfThread();

template <class T>
T LoadGlobal(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    Fail("a load of global memory is not aligned");
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class T>
T LoadShared(uint32_t address) {
  T value;
  std::memcpy(&value, SharedPointer(address, sizeof value), sizeof value);
  return value;
}

template <class T>
float Value(uint32_t pair, int i) {
  T value;
  value.bits = uint16_t(pair >> (16 * i));
  return float(value);
}

}  // namespace emulator

namespace qmoe_plugin {

inline uint4 LoadStreaming16(const void* p) { return emulator::LoadGlobal<uint4>(p); }
inline uint2 LoadStreaming8(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 8 != 0) emulator::Fail("a load of 8 bytes is not aligned");
  return emulator::LoadGlobal<uint2>(p);
}

inline char* DynamicShared() { return emulator::SharedMemory(); }
inline uint32_t SharedAddress(const void* p) { return emulator::AddressOf(p); }

inline uint4 LoadShared16(uint32_t address) { return emulator::LoadShared<uint4>(address); }
inline uint2 LoadShared8(uint32_t address) { return emulator::LoadShared<uint2>(address); }
inline uint32_t LoadShared4(uint32_t address) { return emulator::LoadShared<uint32_t>(address); }
inline void StoreShared16(uint32_t address, uint4 v) {
  std::memcpy(emulator::SharedPointer(address, 16), &v, 16);
}

inline void CopyAsync16(uint32_t shared, const void* global, bool valid) {
  char* to = emulator::SharedPointer(shared, 16);
  emulator::CopiesOfThread().Add([=] {
    const uint4 value = valid ? emulator::LoadGlobal<uint4>(global) : uint4{};
    std::memcpy(to, &value, 16);
  });
}
inline void CopyAsync16(void* shared, const void* global, bool valid) {
  CopyAsync16(SharedAddress(shared), global, valid);
}

template <int kBytes>
void CopyAsync(uint32_t shared, const void* global) {
  char* to = emulator::SharedPointer(shared, kBytes);
  if (reinterpret_cast<uintptr_t>(global) % kBytes != 0) emulator::Fail("cp.async is not aligned");
  emulator::CopiesOfThread().Add([=] { std::memcpy(to, global, kBytes); });
}

inline void CopyAsyncStream16(uint32_t shared, const void* global) {
  CopyAsync<16>(shared, global);
}

inline void CopyAsyncCommit() { emulator::CopiesOfThread().Commit(); }

template <int kPending>
void CopyAsyncWait() {
  emulator::CopiesOfThread().Wait(size_t(kPending));
}

inline void LetNextStart() {}
inline void WaitForPrevious() {}
inline void PrefetchL2(const void*) {}
inline int AddAcquireRelease(int* at, int value) { return atomicAdd(at, value); }
template <class T>
T LoadL2(const T* p) {
  return *p;
}

/// Threads of a part of the block meet at barrier 1 to 15.
template <int kThreads>
void SyncPart(int barrier) {
  emulator::Synchronize(barrier, kThreads);
}

inline float MinOrNan(float x, float y) { return std::isnan(x) ? x : !(x >= y) ? x : y; }
inline float MaxOrNan(float x, float y) { return std::isnan(x) ? x : !(x <= y) ? x : y; }
inline float FastSigmoid2(float x) { return 1.0f / (1.0f + std::exp2(-x)); }

inline void LoadMatrix4(uint32_t (&r)[4], uint32_t shared_row) {
  const unsigned lane = threadIdx.x % 32;
  emulator::OnWarp("ldmatrix", 0xffffffff, shared_row, [&](const uint32_t* rows) {
    for (unsigned i = 0; i < 4; ++i)
      std::memcpy(&r[i], emulator::SharedPointer(rows[8 * i + lane / 4], 16) + lane % 4 * 4, 4);
    return 0;
  });
}
inline void LoadMatrix4(uint32_t (&r)[4], const void* shared_row) {
  LoadMatrix4(r, SharedAddress(shared_row));
}

template <class T>
void Mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::OnWarp("mma", 0xffffffff, mine, [&](const Operands* all) {
    for (unsigned i = 0; i < 4; ++i) {  // row g or g + 8, column 2 t or 2 t + 1
      const unsigned column = 2 * t + i % 2;
      for (unsigned k = 0; k < 16; ++k) {
        const uint32_t left = all[4 * g + k % 8 / 2].a[i / 2 + k / 8 * 2];
        const uint32_t right = all[4 * column + k % 8 / 2].b[k / 8];
        d[i] += emulator::Value<T>(left, k % 2) * emulator::Value<T>(right, k % 2);
      }
    }
    return 0;
  });
}

}  // namespace qmoe_plugin
