// What the two CPU ops share: a packed weight matrix with the kernel that was selected for it, and
// how a GEMM is cut into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"
#include "ops/pack_source.h"

namespace qmoe_plugin::cpu {

/// A task computes up to kTaskRows rows times kTaskPanels panels: 128 columns, 0.2 MB of 4-bit
/// weights at K = 2880. A token that decodes then has 100 tasks and more, each 20 us of memory
/// traffic. The rows are as many as an expert usually has of a prompt of 512 tokens, so that its
/// weights are read from memory once.
inline constexpr int64_t kTaskPanels = 8;
inline constexpr int64_t kTaskRows = 96;
inline constexpr int64_t kTaskColumns = kTaskPanels * kPanelRows;

/// Whether rows of x may lie so many bytes apart. At a large power of two, the rows of a tile would
/// compete for the same few lines of the first-level cache.
constexpr bool FitsCache(int64_t row_bytes) { return row_bytes % 2048 != 0; }

/// The weights of all experts of one projection.
class PackedMatrix {
 public:
  /// Selects the kernel for the problem and packs, if need be. Throws Error.
  PackedMatrix(const PackSource& source, const GemmProblem& problem);

  const CpuIsa& isa() const { return *kernel_->isa; }
  const PackedHeader& header() const { return weights_.header; }
  int64_t k_padded() const { return weights_.shape.k_padded; }
  int64_t panels() const { return weights_.shape.row_tiles; }
  /// Columns of y, padding included.
  int64_t columns() const { return panels() * kPanelRows; }
  /// Runs of kTaskPanels panels, the last one perhaps shorter.
  int64_t tasks() const { return (panels() + kTaskPanels - 1) / kTaskPanels; }

  /// Whether rows of activations are float32, k_padded() of them; else they are what StoreRow makes.
  bool TakesFloats() const { return gemm_.store == nullptr; }
  /// Bytes from a row to the next, where rows are stored for this matrix: a multiple of 64.
  int64_t row_bytes() const;
  /// Stores values [first, first + count) of a row, and zeros up to a multiple of 32, which `first`
  /// is.
  void StoreRow(const float* x, int64_t first, int64_t count, void* row) const;
  /// Stores the zeros behind a row's last value, number `count` - 1.
  void EndRow(int64_t count, void* row) const;

  /// y[rows, ldy] = columns [task * kTaskColumns, ...) of the expert's y. Returns their number,
  /// a multiple of 16.
  struct Rows {
    const void* x;         // by StoreRow; or floats, if it TakesFloats(), zero from k to k_padded()
    int64_t row_bytes;     // row_bytes(), or any that FitsCache
    const int32_t* index;  // [count], row i is x[index[i]]; null = row i
    int64_t count;
  };
  int64_t Multiply(int64_t expert, int64_t task, const Rows& rows, float* y, int64_t ldy) const;

 private:
  const CpuGemm* kernel_;
  GemmKernel gemm_;
  PackedWeights weights_;
  float table_[256];  // GemmArgs::table
};

/// Hands out pieces of a workspace, or only counts them when `base` is null.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}

  template <class T>
  T* Take(int64_t count) {
    uint8_t* const piece = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

/// Runs fn(i) for i in [0, total) on the session's threads; a single one at once.
inline void RunTasks(const ExecutionContext& context, int64_t total,
                     const std::function<void(size_t)>& fn) {
  if (total == 1) return fn(0);
  if (total > 1) context.parallel_for(size_t(total), fn);
}

/// Values that are brought to float32 on the stack, on their way to a row.
inline constexpr int64_t kPiece = 512;

/// `data` plus so many bytes; null stays null.
template <class Void>
Void* Advance(Void* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const uint8_t, uint8_t>;
  return data ? static_cast<Byte*>(data) + bytes : nullptr;
}

/// First element of part `i` when [0, total) is cut into `parts` equal parts.
constexpr int64_t PartStart(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

}  // namespace qmoe_plugin::cpu
