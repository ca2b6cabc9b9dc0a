#include "ops/host_memory.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "ops/error.h"

namespace qmoe_plugin {
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kCacheLine = 64;

/// A hint: where the system grants no huge pages, nothing is lost but speed.
void AskForHugePages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

}  // namespace

std::shared_ptr<uint8_t> AllocateHost(size_t bytes) {
  const bool large = bytes >= kHugePage;
  const size_t alignment = large ? kHugePage : kCacheLine;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* const memory = rounded < bytes ? nullptr : std::aligned_alloc(alignment, rounded);
  if (memory == nullptr)
    FailRuntime("out of memory: cannot allocate ", bytes, " bytes for packed weights");
  if (large) AskForHugePages(memory, rounded);
  return {static_cast<uint8_t*>(memory), [](uint8_t* p) { std::free(p); }};
}

}  // namespace qmoe_plugin
