#include "ops/cpu/packed_matrix.h"

#include "ops/registry.h"

namespace qmoe_plugin::cpu {

PackedMatrix::PackedMatrix(const PackSource& source, const GemmProblem& problem) {
  const Device cpu{DeviceType::kCpu};
  const Kernel& kernel = Select(cpu, problem);
  kernel_ = static_cast<const CpuGemm*>(kernel.launch);
  weights_ = source.ToHost(IsGated(problem.activation), TargetOf(cpu, problem.dtype));
  const float* codebook = weights_.codebook();
  for (int i = 0; i < 256; ++i)
    table_[i] = codebook ? codebook[i % (1 << problem.format->bits)] : kernel_->table[i];
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
  args.ldx = rows.ldx;
  args.row_index = rows.index;
  args.rows = rows.count;
  args.y = y;
  args.ldy = ldy;
  kernel_->gemm(args);
  return args.panels * kPanelRows;
}

}  // namespace qmoe_plugin::cpu
