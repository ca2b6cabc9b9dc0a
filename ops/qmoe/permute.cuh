// Sorts (token, slot) rows by expert and cuts them into row tiles, all on the device.
#pragma once

#include <cuda_runtime.h>

#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin {

/// Row tiles of one GEMM.
struct RowTileList {
  int tile_rows;
  RowTile* tiles;  // by expert, then row; room for MaxRowTiles
  int* count;
  int* next_item;  // becomes 0, see CudaGemmArgs
};

struct PermuteArgs {
  const int* expert_ids;  // [rows], rows = tokens * topk: row r is slot r % topk of token r / topk
  int rows, experts, topk;
  int* expert_offsets;  // [E + 1] first sorted row of each expert
  int* row_token;       // [rows] token of each sorted row
  int* sorted_row;      // [rows] sorted row of each (token, slot)
  RowTileList fc1, fc2;
  Overlap overlap;  // with the kernel before
};

/// Stable: rows of one expert keep the order of their tokens.
void LaunchPermute(const PermuteArgs& args, cudaStream_t stream);

/// Copies rows of 2-byte values: y[r] = x[row_token[r]].
struct GatherArgs {
  const void* x;         // [T, columns]
  const int* row_token;  // [rows]
  int rows, columns;
  void* y;          // [rows, columns]
  Overlap overlap;  // with the kernel before
};
void LaunchGather(const GatherArgs& args, cudaStream_t stream);

void PreparePermute();

}  // namespace qmoe_plugin
