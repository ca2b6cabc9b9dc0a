#include "scheduler.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;
/// Where shared memory begins behind a multiple of 1024: kernels may rely on 16 bytes only.
constexpr size_t kOffset = 16;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned index;
  bool done;
  const char* waits_for;
  bool (*ready)(const void*);
  const void* ready_context;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Block {
  std::vector<Thread*> threads;
  std::vector<Exchange> warps;
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};  // ends where it must
  size_t shared_bytes;
  std::deque<std::function<void()>> later;
  unsigned live;
  uint64_t number = 0;
  unsigned arrived[16];
  uint64_t passed[16];
};

Block block;
Thread* running;
ucontext_t scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
const std::function<void()>* kernel;
std::mt19937 rng(20240229);

/// Tells AddressSanitizer that the stack changes.
void BeforeSwitch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                  [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
void AfterSwitch([[maybe_unused]] void* saved, [[maybe_unused]] const void** from,
                 [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, from, bytes);
#endif
}

void ThreadMain() {
  AfterSwitch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel)();
  running->done = true;
  --block.live;
  BeforeSwitch(nullptr, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&running->context, &scheduler);
}

void Prepare(Thread& thread, unsigned index) {
  thread.index = index;
  thread.done = false;
  thread.ready = nullptr;
  thread.waits_for = "its start";
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, ThreadMain, 0);
}

void Resume(Thread& thread) {
  running = &thread;
  threadIdx = {thread.index, 0, 0};
  BeforeSwitch(&scheduler_fake_stack, thread.stack.get(), kStackBytes);
  swapcontext(&scheduler, &thread.context);
  AfterSwitch(scheduler_fake_stack, nullptr, nullptr);
}

void DoOneLater() {
  const size_t index = rng() % block.later.size();
  const auto work = std::move(block.later[index]);
  block.later.erase(block.later.begin() + ptrdiff_t(index));
  work();
}

[[noreturn]] void FailBecauseAllWait() {
  std::string message = "all threads of block " + std::to_string(blockIdx.x) + " wait:";
  for (const Thread* thread : block.threads)
    if (!thread->done)
      message += "\n  thread " + std::to_string(thread->index) + " for " + thread->waits_for;
  Fail(message);
}

void RunBlock() {
  while (block.live > 0) {
    // From a random thread on, so that no order is relied on.
    const size_t count = block.threads.size(), first = rng() % count;
    bool any = false;
    for (size_t i = 0; i < count; ++i) {
      Thread& thread = *block.threads[(first + i) % count];
      if (thread.done || (thread.ready != nullptr && !thread.ready(thread.ready_context))) continue;
      any = true;
      Resume(thread);
      if (!block.later.empty() && rng() % 256 == 0) DoOneLater();
    }
    if (any) continue;
    if (block.later.empty()) FailBecauseAllWait();
    DoOneLater();
  }
  while (!block.later.empty()) DoOneLater();  // nobody waited for it; it must be harmless
}

}  // namespace

void Fail(const std::string& message) {
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", message.c_str(), blockIdx.x,
               threadIdx.x);
  std::abort();
}

void RunGrid(unsigned blocks, unsigned threads, size_t shared_bytes,
             const std::function<void()>& body) {
  if (threads == 0 || threads > 1024) Fail("a block has " + std::to_string(threads) + " threads");
  static std::vector<std::unique_ptr<Thread>> pool;
  while (pool.size() < threads) pool.push_back(std::make_unique<Thread>());
  kernel = &body;
  blockDim = {threads, 1, 1}, gridDim = {blocks, 1, 1};
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {b, 0, 0};
    block.threads.clear();
    block.warps.assign((threads + 31) / 32, {});
    void* shared = nullptr;  // not by aligned_alloc, which wants the size rounded up
    if (posix_memalign(&shared, 1024, kOffset + shared_bytes) != 0) Fail("there is no memory left");
    block.shared.reset(static_cast<char*>(shared));
    std::memset(block.shared.get(), 0xff, kOffset + shared_bytes);
    block.shared_bytes = shared_bytes;
    block.live = threads;
    ++block.number;
    std::fill_n(block.arrived, 16, 0u);
    std::fill_n(block.passed, 16, uint64_t(0));
    for (unsigned t = 0; t < threads; ++t) {
      Prepare(*pool[t], t);
      block.threads.push_back(pool[t].get());
    }
    RunBlock();
  }
}

void WaitUntil(const char* what, bool (*ready)(const void*), const void* context) {
  if (ready(context)) return;
  Thread& thread = *running;
  thread.waits_for = what, thread.ready = ready, thread.ready_context = context;
  BeforeSwitch(&thread.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&thread.context, &scheduler);
  AfterSwitch(thread.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
  thread.ready = nullptr;
}

void Later(std::function<void()> work) { block.later.push_back(std::move(work)); }

uint64_t BlockNumber() { return block.number; }

char* SharedMemory() { return block.shared.get() + kOffset; }

char* SharedPointer(uint32_t address, size_t bytes) {
  if (address % bytes != 0)
    Fail("an access of " + std::to_string(bytes) + " bytes at shared address " +
         std::to_string(address) + " is not aligned");
  if (address < kOffset || address + bytes > kOffset + block.shared_bytes)
    Fail("shared address " + std::to_string(address) + " is outside of the block's " +
         std::to_string(block.shared_bytes) + " bytes");
  return block.shared.get() + address;
}

uint32_t AddressOf(const void* pointer) {
  const ptrdiff_t address = static_cast<const char*>(pointer) - block.shared.get();
  if (address < ptrdiff_t(kOffset) || size_t(address) > kOffset + block.shared_bytes)
    Fail("a pointer is not to dynamic shared memory");
  return uint32_t(address);
}

Exchange& WarpExchange() { return block.warps[running->index / 32]; }

void Synchronize(int barrier, unsigned threads) {
  const uint64_t passed = block.passed[barrier];
  ++block.arrived[barrier];
  // All that are left, if it is all threads' barrier: the others may return meanwhile.
  const auto complete = [&] {
    const unsigned wanted = threads == 0 ? block.live : threads;
    if (block.passed[barrier] == passed && block.arrived[barrier] >= wanted) {
      block.arrived[barrier] = 0;
      ++block.passed[barrier];
    }
    return block.passed[barrier] != passed;
  };
  WaitUntil("a barrier of the block", complete);
}

}  // namespace emulator
