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
  const int* expert_ids;    // [T, k], those of a token differ
  const int* slice_counts;  // [Slices(T), E] tokens of each slice of each expert
  int tokens, experts, topk;
  int* expert_offsets;  // [E + 1] first sorted row of each expert
  int* row_token;       // [T * k] token of each sorted row
  int* sorted_row;      // [T, k] sorted row of each (token, slot)
  RowTileList fc1, fc2;
  // Rows of x, in any type of 2 bytes and more.
  const void* x;  // [T, row_bytes]
  void* sorted;   // [T * k, row_bytes] becomes x[row_token]; null = not wanted
  int64_t row_bytes;
  Overlap overlap;  // with the kernel before, which may write expert_ids and slice_counts
};

/// Stable: rows of one expert keep the order of their tokens.
void LaunchPermute(const PermuteArgs& args, cudaStream_t stream);
void PreparePermute();

}  // namespace qmoe_plugin
