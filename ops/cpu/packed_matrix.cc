#include "ops/cpu/packed_matrix.h"

#include <cstring>

#include "ops/registry.h"

namespace qmoe_plugin::cpu {

namespace {

const CpuGemm& SelectFor(GemmProblem problem, int64_t rows) {
  problem.rows = rows;
  return *static_cast<const CpuGemm*>(Select(Device{DeviceType::kCpu}, problem).launch);
}

}  // namespace

PackedMatrix::PackedMatrix(const PackSource& source, const GemmProblem& problem)
    : many_rows_(FewestTileRows(problem.accuracy_level) * problem.experts),
      few_(*this, SelectFor(problem, 1), problem.block_size),
      many_(*this, SelectFor(problem, many_rows_), problem.block_size),
      weights_(source.ToHost(IsGated(problem.activation),
                             TargetOf(Device{DeviceType::kCpu}, problem.dtype))) {
  const float* codebook = weights_.codebook();
  for (int i = 0; i < 256; ++i)
    table_[i] = codebook ? codebook[i % (1 << problem.format->bits)] : few_.gemm().table[i];
}

TileSize MatrixProduct::tile_size() const { return kernel_.TileSizeOf(matrix_.k_padded()); }

int64_t MatrixProduct::row_bytes() const {
  // A cache line more than a row, at least.
  const int64_t bytes = matrix_.k_padded() / 32 * kernel_.bytes_of_32 / 64 * 64 + 64;
  return FitsCache(bytes) ? bytes : bytes + 64;
}

int64_t MatrixProduct::StoredBytes(int64_t rows) const {
  return InTiles() ? tile_size().StoredBytes(rows) : rows * row_bytes();
}

int64_t MatrixProduct::BytesOfBlocks(int64_t rows, int64_t blocks) const {
  if (!InTiles()) return rows * row_bytes();
  blocks = std::min(blocks, rows);
  // A tile has room for a row more than there are, at most.
  static_assert(kTaskRows <= kGroupRows);
  const int64_t tiles = rows / kTileRows + blocks;
  return std::min(rows + tiles, tiles * kTileRows) * tile_size().of_row +
         tiles * tile_size().of_tile;
}

StoredRow MatrixProduct::RowAt(void* x, int64_t rows, int64_t row) const {
  if (!InTiles()) return {Advance(x, row * row_bytes())};
  return tile_size().RowAt(static_cast<uint8_t*>(x), rows, row);
}

void MatrixProduct::StoreRow(const float* x, int64_t first, int64_t count,
                             const StoredRow& row) const {
  const auto store = [&](const float* values, int64_t at, int64_t n) {
    if (TakesFloats())
      std::memcpy(static_cast<float*>(row.tile) + at, values, size_t(n) * sizeof(float));
    else
      kernel_.store(values, at, n, row);
  };
  const int64_t whole = count / 32 * 32;
  store(x, first, whole);
  if (whole == count) return;
  float last[32] = {};
  std::copy(x + whole, x + count, last);
  store(last, first + whole, 32);
}

void MatrixProduct::EndRow(int64_t count, const StoredRow& row) const {
  const float zeros[32] = {};
  for (int64_t first = (count + 31) / 32 * 32; first < matrix_.k_padded(); first += 32)
    StoreRow(zeros, first, 32, row);
}

int64_t MatrixProduct::Multiply(int64_t expert, int64_t task, const Rows& rows, float* y,
                                int64_t ldy) const {
  const PackedWeights& weights = matrix_.weights();
  const PackedShape& shape = weights.shape;
  const int64_t first_panel = task * kTaskPanels;
  const int64_t tile = expert * shape.row_tiles + first_panel;
  const int64_t scales_at = tile * std::max<int64_t>(shape.groups, 1) * kPanelRows *
                            int64_t(SizeOf(weights.scale_dtype()));
  const auto scales = [scales_at](const void* section) {
    return section ? static_cast<const uint8_t*>(section) + scales_at : nullptr;
  };
  GemmArgs args;
  args.codes = weights.codes() + tile * shape.tile_bytes;
  args.block_scales = scales(weights.block_scales());
  args.zero_offsets = scales(weights.zero_offsets());
  args.row_scales = weights.row_scales() + tile * kPanelRows;
  args.bias = weights.bias() ? weights.bias() + tile * kPanelRows : nullptr;
  args.half_scales = weights.scale_dtype() == DType::kFloat16;
  args.panels = std::min(kTaskPanels, shape.row_tiles - first_panel);
  args.k_padded = shape.k_padded;
  args.block_size = weights.header.block_size;
  args.table = matrix_.table();
  args.x = rows.x;
  args.row_bytes = rows.row_bytes;
  args.row_index = rows.index;
  args.rows = rows.count;
  args.y = y;
  args.ldy = ldy;
  kernel_.gemm(args);
  return args.panels * kPanelRows;
}

}  // namespace qmoe_plugin::cpu
