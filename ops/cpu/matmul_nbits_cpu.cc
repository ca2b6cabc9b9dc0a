// MatMulNBits on the CPU: Y[M, N] = A[M, K] B^T + bias, in tasks of up to 96 rows x 128 columns.
#include <algorithm>

#include "ops/cpu/packed_matrix.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/qmoe/activation_quant.h"

namespace qmoe_plugin {
namespace {

using cpu::kTaskColumns;
using cpu::kTaskRows;
using cpu::MatrixProduct;
using cpu::PartStart;
using cpu::StoredRow;

/// Rows that are brought to float32 at a time, which bounds the workspace of a long prompt, and
/// those of a task of it.
constexpr int64_t kChunkRows = 480;
constexpr int64_t kLoadRows = 8;

/// Tasks that a product should have for cores to share, with as many rows at least.
constexpr int64_t kFewestTasks = 8, kFewestRows = 16;

class CpuMatMulNBits : public MatMulNBits {
 public:
  CpuMatMulNBits(const MatMulConfig& config, const PackSource& source)
      : config_(config),
        k_order_(source.k_order()),
        matrix_(source, {.stage = GemmStage::kDense,
                         .dtype = config.dtype,
                         .format = &source.format(),
                         .n = config.n,
                         .k = config.k,
                         .block_size = source.block_size(),
                         .zero_points = source.has_zero_points(),
                         .accuracy_level = config.accuracy_level}) {}

  size_t WorkspaceBytes(int64_t m) const override {
    const MatrixProduct& product = matrix_.For(m);
    if (ReadsInPlace(product)) return 0;
    const int64_t chunks = Chunks(m);
    const Blocks blocks = CutRows(product, chunks ? (m + chunks - 1) / chunks : 0);
    return size_t(blocks.count * blocks.bytes);
  }

  PackedHeader Packed() const override { return matrix_.header(); }

  void Run(const MatMulTensors& tensors, const ExecutionContext& context) const override {
    const MatrixProduct& product = matrix_.For(tensors.m);
    if (ReadsInPlace(product)) {
      const int64_t row_bytes = config_.k * int64_t(sizeof(float));
      return Multiply(product, {tensors.a, row_bytes, nullptr, tensors.m}, tensors.y, context);
    }
    uint8_t* const x = static_cast<uint8_t*>(context.workspace);
    const int64_t chunks = Chunks(tensors.m);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = PartStart(tensors.m, chunks, i);
      const int64_t rows = PartStart(tensors.m, chunks, i + 1) - first;
      LoadRows(product, At(tensors.a, first, config_.k), rows, x, context);
      Multiply(product, {x, product.row_bytes(), nullptr, rows}, At(tensors.y, first, config_.n),
               context);
    }
  }

 private:
  static int64_t Chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

  /// Row `row` of A or Y.
  template <class Void>
  Void* At(Void* data, int64_t row, int64_t columns) const {
    return cpu::Advance(data, row * columns * int64_t(SizeOf(config_.dtype)));
  }

  /// Whether the kernel can read A as it is.
  bool ReadsInPlace(const MatrixProduct& product) const {
    return product.TakesFloats() && config_.dtype == DType::kFloat32 && k_order_.empty() &&
           !config_.act_scale && config_.k == matrix_.k_padded() &&
           cpu::FitsCache(config_.k * int64_t(sizeof(float)));
  }

  /// Rows are multiplied in blocks of equal size, whose activations lie so many bytes apart.
  struct Blocks {
    int64_t rows, count, bytes;
    int64_t Start(int64_t block) const { return PartStart(rows, count, block); }
    int64_t Rows(int64_t block) const { return Start(block + 1) - Start(block); }
    int64_t Of(int64_t row) const { return ((row + 1) * count - 1) / rows; }
  };
  Blocks CutRows(const MatrixProduct& product, int64_t rows) const {
    // A few columns (a router's) make few tasks: rows are cut smaller then, as long as it pays.
    const int64_t wanted = (kFewestTasks + matrix_.tasks() - 1) / matrix_.tasks();
    const int64_t count =
        std::max((rows + kTaskRows - 1) / kTaskRows, std::min(wanted, rows / kFewestRows));
    return {rows, count, count == 0 ? 0 : product.StoredBytes((rows + count - 1) / count)};
  }

  void LoadRows(const MatrixProduct& product, const void* a, int64_t rows, uint8_t* x,
                const ExecutionContext& context) const {
    const Blocks blocks = CutRows(product, rows);
    cpu::RunTasks(context, (rows + kLoadRows - 1) / kLoadRows, [&](size_t i) {
      const int64_t last = std::min(rows, int64_t(i + 1) * kLoadRows);
      for (int64_t r = int64_t(i) * kLoadRows; r < last; ++r)
        LoadRow(product, At(a, r, config_.k), RowAt(product, blocks, x, r));
    });
  }

  /// Where row `row` of the activations lies.
  static StoredRow RowAt(const MatrixProduct& product, const Blocks& blocks, uint8_t* x,
                         int64_t row) {
    if (!product.InTiles()) return product.RowAt(x, blocks.rows, row);
    const int64_t block = blocks.Of(row);
    return product.RowAt(x + block * blocks.bytes, blocks.Rows(block), row - blocks.Start(block));
  }

  /// One row of A, in the order of the packed k.
  void LoadRow(const MatrixProduct& product, const void* a, const StoredRow& row) const {
    const int64_t values = k_order_.empty() ? config_.k : int64_t(k_order_.size());
    float piece[cpu::kPiece];
    for (int64_t first = 0; first < values; first += cpu::kPiece) {
      const int64_t count = std::min(cpu::kPiece, values - first);
      LoadPiece(product, a, first, count, piece);
      QuantizeActivations(config_.activation_quant(), config_.act_scale.value_or(1), count, piece);
      product.StoreRow(piece, first, count, row);
    }
    product.EndRow(values, row);
  }

  /// Values [first, first + count) of a row of A in that order.
  void LoadPiece(const MatrixProduct& product, const void* a, int64_t first, int64_t count,
                 float* x) const {
    if (k_order_.empty()) return product.isa().to_float(At(a, first, 1), config_.dtype, count, x);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t k = k_order_[size_t(first + i)];
      x[i] = k < 0 ? 0.0f : LoadFloat(a, config_.dtype, size_t(k));
    }
  }

  void Multiply(const MatrixProduct& product, const MatrixProduct::Rows& a, void* y,
                const ExecutionContext& context) const {
    const Blocks blocks = CutRows(product, a.count);
    cpu::RunTasks(context, blocks.count * matrix_.tasks(), [&](size_t i) {
      // Neighbours share weights.
      const int64_t task = int64_t(i) / blocks.count, block = int64_t(i) % blocks.count;
      const int64_t first = blocks.Start(block), rows = blocks.Rows(block);
      float sums[kTaskRows * kTaskColumns];
      const void* const x =
          cpu::Advance(a.x, product.InTiles() ? block * blocks.bytes : first * a.row_bytes);
      product.Multiply(0, task, {x, a.row_bytes, nullptr, rows}, sums, kTaskColumns);
      const int64_t column = task * kTaskColumns;
      const int64_t columns = std::min(kTaskColumns, config_.n - column);
      for (int64_t r = 0; r < rows; ++r)
        product.isa().from_float(sums + r * kTaskColumns, columns, config_.dtype,
                                 At(At(y, first + r, config_.n), column, 1));
    });
  }

  const MatMulConfig config_;
  const std::vector<int32_t> k_order_;
  const cpu::PackedMatrix matrix_;
};

}  // namespace

std::unique_ptr<MatMulNBits> MakeCpuMatMulNBits(const MatMulConfig& config,
                                                const PackSource& weights) {
  return std::make_unique<CpuMatMulNBits>(config, weights);
}

}  // namespace qmoe_plugin
