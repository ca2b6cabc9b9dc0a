// MatMulNBits on the CPU: Y[M, N] = A[M, K] B^T + bias, in tasks of up to 48 rows x 128 columns.
#include <algorithm>

#include "ops/cpu/packed_matrix.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/qmoe/activation_quant.h"

namespace qmoe_plugin {
namespace {

using cpu::kTaskColumns;
using cpu::kTaskRows;
using cpu::PartStart;

/// Rows that are brought to float32 at a time, which bounds the workspace of a long prompt, and
/// those of a task of it.
constexpr int64_t kChunkRows = 480;
constexpr int64_t kLoadRows = 8;

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
    return ReadsInPlace() ? 0 : size_t(std::min(m, kChunkRows) * RowStride()) * sizeof(float);
  }

  PackedHeader Packed() const override { return matrix_.header(); }

  void Run(const MatMulTensors& tensors, const ExecutionContext& context) const override {
    if (ReadsInPlace()) {
      const float* a = static_cast<const float*>(tensors.a);
      return Multiply({a, config_.k, nullptr, tensors.m}, tensors.y, context);
    }
    float* const x = static_cast<float*>(context.workspace);
    for (int64_t first = 0; first < tensors.m; first += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, tensors.m - first);
      LoadRows(At(tensors.a, first, config_.k), rows, x, context);
      Multiply({x, RowStride(), nullptr, rows}, At(tensors.y, first, config_.n), context);
    }
  }

 private:
  /// Row `row` of A or Y.
  template <class Void>
  Void* At(Void* data, int64_t row, int64_t columns) const {
    return cpu::Advance(data, row * columns * int64_t(SizeOf(config_.dtype)));
  }

  /// Whether the kernel can read A as it is.
  bool ReadsInPlace() const {
    return config_.dtype == DType::kFloat32 && k_order_.empty() && !config_.act_scale &&
           config_.k == matrix_.k_padded() && cpu::FitsCache(config_.k);
  }

  int64_t RowStride() const { return cpu::RowStride(matrix_.k_padded()); }

  void LoadRows(const void* a, int64_t rows, float* x, const ExecutionContext& context) const {
    cpu::RunTasks(context, (rows + kLoadRows - 1) / kLoadRows, [&](size_t i) {
      const int64_t last = std::min(rows, int64_t(i + 1) * kLoadRows);
      for (int64_t r = int64_t(i) * kLoadRows; r < last; ++r)
        LoadRow(At(a, r, config_.k), x + r * RowStride());
    });
  }

  /// One row of A as float32, in the order of the packed k and with zeros for its padding.
  void LoadRow(const void* a, float* x) const {
    if (k_order_.empty()) {
      matrix_.isa().to_float(a, config_.dtype, config_.k, x);
      QuantizeActivations(config_.activation_quant(), config_.act_scale.value_or(1), config_.k, x);
      std::fill(x + config_.k, x + matrix_.k_padded(), 0.0f);
      return;
    }
    const int64_t ordered = int64_t(k_order_.size());
    for (int64_t p = 0; p < ordered; ++p)
      x[p] = k_order_[p] < 0 ? 0.0f : LoadFloat(a, config_.dtype, size_t(k_order_[p]));
    std::fill(x + ordered, x + matrix_.k_padded(), 0.0f);
  }

  void Multiply(const cpu::PackedMatrix::Rows& a, void* y, const ExecutionContext& context) const {
    const int64_t blocks = (a.count + kTaskRows - 1) / kTaskRows;
    cpu::RunTasks(context, blocks * matrix_.tasks(), [&](size_t i) {
      // Neighbours share weights.
      const int64_t task = int64_t(i) / blocks, block = int64_t(i) % blocks;
      const int64_t first = PartStart(a.count, blocks, block);
      const int64_t rows = PartStart(a.count, blocks, block + 1) - first;
      float sums[kTaskRows * kTaskColumns];
      matrix_.Multiply(0, task, {a.x + first * a.ldx, a.ldx, nullptr, rows}, sums, kTaskColumns);
      const int64_t column = task * kTaskColumns;
      const int64_t columns = std::min(kTaskColumns, config_.n - column);
      for (int64_t r = 0; r < rows; ++r)
        matrix_.isa().from_float(sums + r * kTaskColumns, columns, config_.dtype,
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
