#include "ops/cpu/packed_matrix.h"

#include <cstring>

#include "ops/registry.h"

namespace qmoe_plugin::cpu {

PackedMatrix::PackedMatrix(const PackSource& source, const GemmProblem& problem) {
  const Device cpu{DeviceType::kCpu};
  const Kernel& kernel = Select(cpu, problem);
  kernel_ = static_cast<const CpuGemm*>(kernel.launch);
  gemm_ = kernel_->For(problem.block_size);
  weights_ = source.ToHost(IsGated(problem.activation), TargetOf(cpu, problem.dtype));
  const float* codebook = weights_.codebook();
  for (int i = 0; i < 256; ++i)
    table_[i] = codebook ? codebook[i % (1 << problem.format->bits)] : kernel_->table[i];
}

int64_t PackedMatrix::row_bytes() const {
  // A cache line more than a row, at least.
  const int64_t bytes = k_padded() / 32 * gemm_.bytes_of_32 / 64 * 64 + 64;
  return FitsCache(bytes) ? bytes : bytes + 64;
}

void PackedMatrix::StoreRow(const float* x, int64_t first, int64_t count, void* row) const {
  const auto store = [&](const float* values, int64_t at, int64_t n) {
    if (TakesFloats())
      std::memcpy(static_cast<float*>(row) + at, values, size_t(n) * sizeof(float));
    else
      gemm_.store(values, at, n, row);
  };
  const int64_t whole = count / 32 * 32;
  store(x, first, whole);
  if (whole == count) return;
  float last[32] = {};
  std::copy(x + whole, x + count, last);
  store(last, first + whole, 32);
}

void PackedMatrix::EndRow(int64_t count, void* row) const {
  const float zeros[32] = {};
  for (int64_t first = (count + 31) / 32 * 32; first < k_padded(); first += 32)
    StoreRow(zeros, first, 32, row);
}

int64_t PackedMatrix::Multiply(int64_t expert, int64_t task, const Rows& rows, float* y,
                               int64_t ldy) const {
  const PackedShape& shape = weights_.shape;
  const int64_t first_panel = task * kTaskPanels;
  const int64_t tile = expert * shape.row_tiles + first_panel;
  const int64_t scales_at = tile * std::max<int64_t>(shape.groups, 1) * kPanelRows *
                            int64_t(SizeOf(weights_.scale_dtype()));
  const auto scales = [scales_at](const void* section) {
    return section ? static_cast<const uint8_t*>(section) + scales_at : nullptr;
  };
  GemmArgs args;
  args.codes = weights_.codes() + tile * shape.tile_bytes;
  args.block_scales = scales(weights_.block_scales());
  args.zero_offsets = scales(weights_.zero_offsets());
  args.row_scales = weights_.row_scales() + tile * kPanelRows;
  args.bias = weights_.bias() ? weights_.bias() + tile * kPanelRows : nullptr;
  args.half_scales = weights_.scale_dtype() == DType::kFloat16;
  args.panels = std::min(kTaskPanels, panels() - first_panel);
  args.k_padded = shape.k_padded;
  args.block_size = weights_.header.block_size;
  args.table = table_;
  args.x = rows.x;
  args.row_bytes = rows.row_bytes;
  args.row_index = rows.index;
  args.rows = rows.count;
  args.y = y;
  args.ldy = ldy;
  gemm_.gemm(args);
  return args.panels * kPanelRows;
}

}  // namespace qmoe_plugin::cpu
