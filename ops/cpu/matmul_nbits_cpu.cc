// MatMulNBits on the CPU: Y[M, N] = A[M, K] B^T + bias, in tasks of up to 48 rows x 128 columns.
#include <algorithm>

#include "ops/cpu/packed_matrix.h"
#include "ops/matmul_nbits/matmul_nbits.h"

namespace qmoe_plugin {
namespace {

using cpu::Arena;
using cpu::kTaskColumns;
using cpu::kTaskRows;
using cpu::PartStart;

/// Rows that are converted to float32 at a time; bounds the workspace of a long prompt.
constexpr int64_t kChunkRows = 480;

class CpuMatMulNBits : public MatMulNBits {
 public:
  CpuMatMulNBits(const MatMulConfig& config, const RowReader& reader)
      : config_(config),
        k_order_(reader.k_order()),
        matrix_(reader, {.stage = GemmStage::kDense,
                         .dtype = config.dtype,
                         .format = &reader.format(),
                         .n = config.n,
                         .k = config.k,
                         .block_size = reader.block_size(),
                         .zero_points = reader.has_zero_points(),
                         .accuracy_level = config.accuracy_level}) {}

  size_t WorkspaceBytes(int64_t m) const override {
    Arena arena(nullptr);
    TakeRows(arena, m);
    return arena.used();
  }

  PackedHeader Packed() const override { return matrix_.header(); }

  void Run(const MatMulTensors& tensors, const ExecutionContext& context) const override {
    if (ReadsInPlace()) {
      const float* a = static_cast<const float*>(tensors.a);
      return Multiply({a, config_.k, nullptr, tensors.m}, tensors.y, context);
    }
    Arena arena(context.workspace);
    float* const x = TakeRows(arena, tensors.m);
    for (int64_t first = 0; first < tensors.m; first += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, tensors.m - first);
      const uint8_t* a = static_cast<const uint8_t*>(tensors.a) + first * config_.k * ElementSize();
      cpu::RunTasks(context, rows, [&](size_t r) {
        LoadRow(a + int64_t(r) * config_.k * ElementSize(), x + int64_t(r) * matrix_.k_padded());
      });
      Multiply({x, matrix_.k_padded(), nullptr, rows},
               static_cast<uint8_t*>(tensors.y) + first * config_.n * ElementSize(), context);
    }
  }

 private:
  int64_t ElementSize() const { return int64_t(SizeOf(config_.dtype)); }

  /// Whether the kernel can read the rows of A as they are.
  bool ReadsInPlace() const {
    return config_.dtype == DType::kFloat32 && config_.k == matrix_.k_padded() && k_order_.empty();
  }

  float* TakeRows(Arena& arena, int64_t m) const {
    return ReadsInPlace() ? nullptr
                          : arena.Take<float>(std::min(m, kChunkRows) * matrix_.k_padded());
  }

  /// One row of A in the order of the packed k, zeros where those are padding.
  void LoadRow(const void* a, float* x) const {
    if (k_order_.empty()) {
      matrix_.isa().to_float(a, config_.dtype, config_.k, x);
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
        matrix_.isa().from_float(
            sums + r * kTaskColumns, columns, config_.dtype,
            static_cast<uint8_t*>(y) + ((first + r) * config_.n + column) * ElementSize());
    });
  }

  const MatMulConfig config_;
  const std::vector<int32_t> k_order_;
  const cpu::PackedMatrix matrix_;
};

}  // namespace

std::unique_ptr<MatMulNBits> MakeCpuMatMulNBits(const MatMulConfig& config,
                                                const RowReader& weights) {
  return std::make_unique<CpuMatMulNBits>(config, weights);
}

}  // namespace qmoe_plugin
