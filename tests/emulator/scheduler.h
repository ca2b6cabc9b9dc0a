// Threads of an emulated GPU: coroutines that take turns on one thread of the CPU. README.md tells the idea.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

/// Ends the process with a message: a kernel did what a GPU would not do.
[[noreturn]] void Fail(const std::string& message);

/// Runs body() for every thread of `blocks` blocks, one block after the other.
void RunGrid(unsigned blocks, unsigned threads, size_t shared_bytes,
             const std::function<void()>& body);

/// Lets other threads of the block run until ready(context). `what` says what for.
void WaitUntil(const char* what, bool (*ready)(const void*), const void* context);

template <class Ready>
void WaitUntil(const char* what, const Ready& ready) {
  WaitUntil(
      what, [](const void* context) { return (*static_cast<const Ready*>(context))(); }, &ready);
}

/// Does `work` some time later, while threads wait: an asynchronous copy's data arriving.
void Later(std::function<void()> work);

/// Counts the blocks that ran, over all grids.
uint64_t BlockNumber();

/// Dynamic shared memory of the block. Addresses count from a base that is 16-byte aligned only.
char* SharedMemory();
char* SharedPointer(uint32_t address, size_t bytes);  // checks bounds and alignment to `bytes`
uint32_t AddressOf(const void* pointer);

/// What a warp instruction exchanges: each lane gives up to kLaneBytes.
inline constexpr size_t kLaneBytes = 64;
struct Exchange {
  alignas(16) unsigned char lanes[32][kLaneBytes];
  const char* what = nullptr;
  uint32_t arrived = 0, leaving = 0;
};
Exchange& WarpExchange();

/// Waits at a barrier of the block until so many threads have come.
void Synchronize(int barrier, unsigned threads);

}  // namespace emulator
