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

class PackedMatrix;

/// How a matrix is multiplied: by one kernel, and what that reads rows of activations as.
///
/// Rows that kernels read one by one lie row_bytes() apart; tasks may take any of them, by an index.
/// Those that it reads in tiles lie as row_tiles.h says, for just the rows of a task.
class MatrixProduct {
 public:
  MatrixProduct(const PackedMatrix& matrix, const CpuGemm& gemm, int64_t block_size)
      : matrix_(matrix), gemm_(gemm), kernel_(gemm.For(block_size)) {}

  const CpuGemm& gemm() const { return gemm_; }
  const CpuIsa& isa() const { return *gemm_.isa; }
  /// Whether rows of activations are float32, k_padded() of them; else they are what StoreRow makes.
  bool TakesFloats() const { return kernel_.store == nullptr; }
  bool InTiles() const { return kernel_.in_tiles; }

  /// Bytes from a row to the next, where they do not lie in tiles: a multiple of 64.
  int64_t row_bytes() const;
  /// Bytes of `rows` rows that a task multiplies; never less than those of fewer.
  int64_t StoredBytes(int64_t rows) const;
  /// Enough for `rows` rows in up to so many blocks, each of up to kTaskRows that a task multiplies.
  int64_t BytesOfBlocks(int64_t rows, int64_t blocks) const;
  /// Row `row` of `rows`, at least 1, that a task multiplies, from `x` on.
  StoredRow RowAt(void* x, int64_t rows, int64_t row) const;
  /// Stores values [first, first + count) of a row, and zeros up to a multiple of 32, which `first`
  /// is.
  void StoreRow(const float* x, int64_t first, int64_t count, const StoredRow& row) const;
  /// Stores the zeros behind a row's last value, number `count` - 1.
  void EndRow(int64_t count, const StoredRow& row) const;

  /// Rows of a task.
  struct Rows {
    const void* x;         // by StoreRow; or floats, if it TakesFloats(), zero from k to k_padded()
    int64_t row_bytes;     // row_bytes(), or any that FitsCache; not read if InTiles()
    const int32_t* index;  // [count], row i is x[index[i]]; null = row i, and if InTiles()
    int64_t count;
  };
  /// y[rows, ldy] = columns [task * kTaskColumns, ...) of the expert's y. Returns their number,
  /// a multiple of 16.
  int64_t Multiply(int64_t expert, int64_t task, const Rows& rows, float* y, int64_t ldy) const;

 private:
  TileSize tile_size() const;

  const PackedMatrix& matrix_;
  const CpuGemm& gemm_;
  const GemmKernel& kernel_;  // of gemm_, for the matrix's blocks
};

/// The weights of all experts of one projection.
class PackedMatrix {
 public:
  /// Selects the kernels for the problem, for few rows and for many, and packs, if need be. Throws
  /// Error.
  PackedMatrix(const PackSource& source, const GemmProblem& problem);
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  const PackedWeights& weights() const { return weights_; }
  const float* table() const { return table_; }  // GemmArgs::table
  const PackedHeader& header() const { return weights_.header; }
  int64_t k_padded() const { return weights_.shape.k_padded; }
  int64_t panels() const { return weights_.shape.row_tiles; }
  /// Columns of y, padding included.
  int64_t columns() const { return panels() * kPanelRows; }
  /// Runs of kTaskPanels panels, the last one perhaps shorter.
  int64_t tasks() const { return (panels() + kTaskPanels - 1) / kTaskPanels; }

  /// How so many rows, of all experts together, are multiplied.
  const MatrixProduct& For(int64_t rows) const { return rows < many_rows_ ? few_ : many_; }

 private:
  const int64_t many_rows_;
  const MatrixProduct few_, many_;
  const PackedWeights weights_;
  float table_[256];
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
