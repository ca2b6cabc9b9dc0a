#include "ops/ort/mapped_pages.h"

#ifdef __linux__

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <string>

namespace qmoe_plugin::ort {
namespace {

struct Range {
  uintptr_t begin, end;
};

/// A mapping of a file, and whether pages of it may have been replaced by private copies that were
/// written to.
struct Mapping {
  Range range;
  bool may_hold_copies;
};

std::vector<Mapping> FileMappings() {
  std::vector<Mapping> mappings;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    char permissions[5] = {};
    unsigned long inode = 0;
    int path = 0;  // where the path starts; "[heap]" and the like are no files
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %lu %n", &begin, &end,
                    permissions, &inode, &path) != 4 ||
        inode == 0 || path == 0 || line[path] != '/' || permissions[0] != 'r')
      continue;
    mappings.push_back({{begin, end}, permissions[3] == 'p'});
  }
  return mappings;
}

/// Calls drop(range) for each run of pages in `range` that are in memory and still the file's own,
/// as /proc/self/pagemap tells: a page that was written to is anonymous, and dropping it would lose
/// what was written.
template <class Drop>
void ForEachCleanRun(int pagemap, Range range, uintptr_t page, const Drop& drop) {
  constexpr uint64_t kPresent = uint64_t(1) << 63, kFilePage = uint64_t(1) << 61;
  constexpr size_t kBatch = 8192;
  std::vector<uint64_t> entries(kBatch);
  Range run{range.begin, range.begin};
  for (uintptr_t at = range.begin; at < range.end; at += kBatch * page) {
    const size_t pages = std::min<size_t>(kBatch, (range.end - at) / page);
    const ssize_t size = ssize_t(pages * sizeof(uint64_t));
    if (pread(pagemap, entries.data(), size_t(size), off_t(at / page * sizeof(uint64_t))) != size)
      break;
    for (size_t i = 0; i < pages; ++i) {
      const uintptr_t address = at + i * page;
      const bool clean = (entries[i] & kPresent) && (entries[i] & kFilePage);
      if (clean && run.end != address) {
        if (run.begin != run.end) drop(run);
        run.begin = address;
      }
      if (clean) run.end = address + page;
    }
  }
  if (run.begin != run.end) drop(run);
}

}  // namespace

void ReleaseMappedPages(std::span<const TensorView> tensors) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto drop = [](Range range) {
    madvise(reinterpret_cast<void*>(range.begin), range.end - range.begin, MADV_DONTNEED);
  };
  std::vector<Mapping> mappings;
  int pagemap = -1;
  for (const TensorView& tensor : tensors) {
    if (!tensor.data) continue;
    const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.data);
    const Range inside{(data + page - 1) / page * page, (data + tensor.bytes()) / page * page};
    if (inside.begin >= inside.end) continue;
    if (mappings.empty()) mappings = FileMappings();
    for (const Mapping& mapping : mappings) {
      const Range part{std::max(inside.begin, mapping.range.begin),
                       std::min(inside.end, mapping.range.end)};
      if (part.begin >= part.end) continue;
      if (!mapping.may_hold_copies) {
        drop(part);
        continue;
      }
      if (pagemap < 0) pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
      if (pagemap >= 0) ForEachCleanRun(pagemap, part, page, drop);
    }
  }
  if (pagemap >= 0) close(pagemap);
}

}  // namespace qmoe_plugin::ort

#else

namespace qmoe_plugin::ort {
void ReleaseMappedPages(std::span<const TensorView>) {}
}  // namespace qmoe_plugin::ort

#endif
