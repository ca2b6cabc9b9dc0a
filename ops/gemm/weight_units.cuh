// What a block of gemv_sm80 does around the stream of weights: which units are its own, their rows of x, and a unit's end.
#pragma once

#include "ops/common/fast_divisor.cuh"
#include "ops/common/tile.cuh"
#include "ops/gemm/fused_route.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::gemv_sm80 {

inline constexpr int kWarps = 16, kThreads = kWarps * 32;
inline constexpr int kMaxSlots = 4;  // that a block works on at once
static_assert(kWarps >= kFusedTokens && kThreads >= kFusedExperts);

/// How a launch is cut.
struct Plan {
  int rows;        // of x in shared memory, at most: of all slots that a block works on at once
  int row_stride;  // bytes of one; 16 mod 128: ldmatrix without bank conflicts
  FastDivisor k_tiles, row_tiles, x_chunks, blocks;
};

/// Where this block's units begin and end if all cost the same: those of more than 8 rows take longer. One warp; all lanes get both.
__device__ inline void CutByCost(const CudaGemmArgs& args, int slots, int lane, int* begin,
                                 int* end) {
  constexpr int kFew = 10, kMany = 13;  // measured
  const auto cost = [&](int slot) {
    RowTile tile;
    if (slot >= slots || !GetRowTile(args, slot, &tile)) return 0;
    return tile.row_count > 8 ? kMany : kFew;
  };
  int64_t all = 0;
  for (int first = 0; first < slots; first += 32)
    all += __reduce_add_sync(0xffffffff, unsigned(cost(first + lane)));
  all *= args.row_tiles;
  const int64_t from = all * blockIdx.x / gridDim.x, to = all * (blockIdx.x + 1) / gridDim.x;
  int begins = 0, ends = 0;  // units that begin before `from` and `to`, of this lane's slots
  int64_t before = 0;        // cost of the slots so far
  for (int first = 0; first < slots; first += 32) {
    const int mine = cost(first + lane);
    int sum = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffff, sum, offset);
      if (lane >= offset) sum += other;
    }
    const int64_t slot_begin = before + int64_t(sum - mine) * args.row_tiles;
    const auto units_before = [&](int64_t cut) {
      if (mine == 0 || cut <= slot_begin) return 0;
      const int64_t units = min((cut - slot_begin + mine - 1) / mine, int64_t(args.row_tiles));
      return (first + lane) * args.row_tiles + int(units);
    };
    begins = max(begins, units_before(from));
    ends = max(ends, units_before(to));
    before += int64_t(__shfl_sync(0xffffffff, sum, 31)) * args.row_tiles;
  }
  *begin = int(__reduce_max_sync(0xffffffff, unsigned(begins)));
  *end = int(__reduce_max_sync(0xffffffff, unsigned(ends)));
}

/// Rows of x of `slots` slots, one after the other, to shared memory. Waits for nothing.
template <class T>
__device__ void StageX(const CudaGemmArgs& args, const Plan& plan, const RowTile* tiles, int slots,
                       const int* row_token, char* shared) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(args.x) | (args.x_stride * sizeof(T));
  const bool aligned = bits % 16 == 0 && args.k % 8 == 0;
  const int chunks = (args.k + kTileK - 1) / kTileK * 8;
  for (int slot = 0; slot < slots; shared += tiles[slot++].row_count * plan.row_stride) {
    const RowTile tile = tiles[slot];
    for (int index = threadIdx.x; index < tile.row_count * chunks; index += kThreads) {
      const int row = plan.x_chunks.Divide(index), k = (index - row * chunks) * 8;
      const int sorted = tile.row_begin + row;
      const T* source = row_token != nullptr
                            ? static_cast<const T*>(args.x) + row_token[sorted] * args.x_stride
                            : XRow<T>(args, sorted);
      char* target = shared + row * plan.row_stride + k * int(sizeof(T));
      if (aligned) {
        CopyAsync16(target, k < args.k ? source + k : source, k < args.k);
        continue;
      }
      uint4 value{};
      T* values = reinterpret_cast<T*>(&value);
      for (int e = 0; e < 8; ++e)
        if (k + e < args.k) values[e] = source[k + e];
      *reinterpret_cast<uint4*>(target) = value;
    }
  }
  CopyAsyncCommit();
}

/// Row scales and biases of a lane's tile rows, g and g + 8.
struct UnitEnd {
  float2 scale, bias;
};

__device__ inline UnitEnd LoadUnitEnd(const CudaGemmArgs& args, int expert, int row_tile,
                                      int lane) {
  const int64_t at = (int64_t(expert) * args.row_tiles + row_tile) * kTileRows + lane / 4 * 2;
  UnitEnd end{*reinterpret_cast<const float2*>(args.row_scales + at), make_float2(0.0f, 0.0f)};
  if (args.bias != nullptr) end.bias = *reinterpret_cast<const float2*>(args.bias + at);
  return end;
}

/// Row scale, bias, activation; stores what lane (g, t) has of a unit: tile rows g and g + 8 of rows 8 n + 2t, 2t + 1 of x.
template <class T, int kN>
__device__ void Finish(const CudaGemmArgs& args, const RowTile& tile, int row_tile, int lane,
                       const float (&sums)[kN][4], const UnitEnd& end) {
  const int per_tile = args.gated ? kTileRows / 2 : kTileRows;
  const int column = row_tile * per_tile + lane / 4, columns = args.gated ? args.n / 2 : args.n;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = n * 8 + lane % 4 * 2 + c;
      if (row >= tile.row_count) continue;
      const float v = sums[n][c] * end.scale.x + end.bias.x;
      const float u = sums[n][c + 2] * end.scale.y + end.bias.y;
      const int64_t y_row = tile.row_begin + row;
      if (column < columns) StoreY<T>(args, y_row, column, Activate(args.activation, v, u));
      if (!args.gated && column + 8 < columns)
        StoreY<T>(args, y_row, column + 8, Activate(args.activation, u, 0.0f));
    }
  }
}

/// Called by the warp that has finished a unit of fc2 for one token, whose expert j has row j of y. The last one of a row tile adds
/// up what the experts give, in the order of j whoever is last, and rounds once.
template <class T>
__device__ void AddUpExperts(const CudaGemmArgs& args, const FusedRoute& fused,
                             const RouteTable& table, int row_tile, int lane) {
  __syncwarp();
  int before = 0;
  if (lane == 0) before = AddAcquireRelease(fused.arrivals + row_tile, 1);
  if (__shfl_sync(0xffffffff, before, 0) != fused.route.topk - 1) return;
  const int column = row_tile * kTileRows + lane;
  if (lane >= kTileRows || column >= args.n) return;
  const float* y = static_cast<const float*>(args.y) + column;
  float sum = 0;
  for (int j = 0; j < fused.route.topk; ++j, y += args.y_stride) sum += table.scales[j] * LoadL2(y);
  static_cast<T*>(fused.output)[column] = FromFloat<T>(sum);
}

}  // namespace qmoe_plugin::gemv_sm80
