// Barriers and asynchronous work of the emulated GPU, by thread and by address of shared memory.
#include <map>

#include "ops/common/hopper.cuh"

namespace emulator {
namespace {

/// Of all threads of the running block; forgotten when the next one starts.
struct State {
  uint64_t block = ~uint64_t(0);
  std::map<unsigned, Groups> copies, products;  // by thread
  struct Barrier {
    int arrivals, missing;
    int64_t bytes = 0;
    uint32_t phase = 0;
  };
  std::map<uint32_t, Barrier> barriers;
};

State& Current() {
  static State state;
  if (state.block != BlockNumber()) {
    for (const auto& [thread, products] : state.products)
      if (!products.empty()) Fail("a thread ended before its wgmmas did");
    state = {};
    state.block = BlockNumber();
  }
  return state;
}

State::Barrier& Find(uint32_t address) {
  SharedPointer(address, 8);
  const auto found = Current().barriers.find(address);
  if (found == Current().barriers.end()) Fail("a barrier was not initialised");
  return found->second;
}

/// Ends the phase if all have arrived and all bytes are there.
void Settle(State::Barrier& barrier) {
  if (barrier.missing < 0) Fail("more arrivals at a barrier than it counts");
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
}

/// So many bytes that the barrier at this address waits for are there.
void Land(uint32_t address, int64_t bytes) {
  State::Barrier& barrier = Find(address);
  barrier.bytes -= bytes;
  Settle(barrier);
}

}  // namespace

Groups& CopiesOfThread() { return Current().copies[threadIdx.x]; }
Groups& ProductsOfThread() { return Current().products[threadIdx.x]; }

void InitBarrier(uint32_t barrier, int arrivals) {
  SharedPointer(barrier, 8);
  Current().barriers[barrier] = {arrivals, arrivals};
}

void Arrive(uint32_t address, uint32_t expected_bytes) {
  State::Barrier& barrier = Find(address);
  barrier.bytes += expected_bytes;
  --barrier.missing;
  Settle(barrier);
}

void ArriveAfterCopies(uint32_t barrier) {
  Later([barrier, copies = CopiesOfThread().Take()] {
    for (const auto& copy : copies) copy();
    Arrive(barrier, 0);
  });
}

void Wait(uint32_t address, uint32_t parity) {
  State::Barrier& barrier = Find(address);
  WaitUntil("a barrier in shared memory", [&] { return (barrier.phase & 1) != parity; });
}

void CopyBytes(uint32_t shared, const void* from, uint32_t bytes, uint32_t address) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    Fail("a bulk copy is not of whole 16 bytes");
  char* to = SharedPointer(shared, 16);
  SharedPointer(shared + bytes - 1, 1);
  Later([=] {
    std::memcpy(to, from, bytes);
    Land(address, bytes);
  });
}

void CopyBox(uint32_t shared, const CUtensorMap& tensor, int column, int row, uint32_t address) {
  const uint32_t row_bytes = tensor.box_columns * tensor.element_bytes;
  SharedPointer(shared, tensor.swizzled ? 1024 : 128);
  SharedPointer(shared + tensor.box_rows * row_bytes - 1, 1);
  Later([=, map = tensor] {
    for (uint32_t r = 0; r < map.box_rows; ++r) {
      for (uint32_t c = 0; c < map.box_columns; ++c) {
        const int64_t from_row = int64_t(row) + r, from_column = int64_t(column) + c;
        const bool inside = from_row >= 0 && uint64_t(from_row) < map.rows && from_column >= 0 &&
                            uint64_t(from_column) < map.columns;
        const uint32_t at = shared + r * row_bytes + c * map.element_bytes;
        char* to = map.swizzled ? Swizzled(at, 1) : SharedPointer(at, 1);
        if (inside)
          std::memcpy(
              to, map.data + from_row * int64_t(map.row_bytes) + from_column * map.element_bytes,
              map.element_bytes);
        else
          std::memset(to, 0, map.element_bytes);
      }
    }
    Land(address, int64_t(map.box_rows) * row_bytes);
  });
}

}  // namespace emulator
