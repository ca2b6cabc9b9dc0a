// What a block of gemv_sm80 does around the stream of weights: which units are its own, their rows of x, and a unit's end.
#pragma once

#include "ops/common/fast_divisor.cuh"
#include "ops/common/tile.cuh"
#include "ops/gemm/fused_route.cuh"
#include "ops/gemm/gemm.cuh"
#include "ops/qmoe/activation_quant.cuh"

namespace qmoe_plugin::gemv_sm80 {

inline constexpr int kWarps = 16, kThreads = kWarps * 32;
inline constexpr int kMaxSlots = 4;  // that a block works on at once
/// What a unit costs with up to 8 rows of x, and with more; measured.
inline constexpr uint32_t kFewCost = 10, kManyCost = 13;
/// k tiles of weights that a block could read in the time that it takes to begin with other rows of x; measured.
inline constexpr int kRoundTiles = 450;
/// Most units of a launch, rounds counted: the sum of their costs has 31 bits.
inline constexpr int64_t kMaxUnits = INT32_MAX / kManyCost;
static_assert(kWarps >= kFusedTokens && kThreads >= kFusedExperts &&
              kThreads >= kFusedRows * kRankParts);

/// How a launch is cut.
struct Plan {
  int rows;            // of x in shared memory, at most: of all slots that a block works on at once
  int part_tiles;      // n8 tiles of the sums that warps share
  int unit_end_bytes;  // of a warp's copy of a unit's end; 0 = it has none
  int row_stride;      // bytes of one; 16 mod 128: ldmatrix without bank conflicts
  int round_cost;      // of rows of x that do not fit beside those of the slot before
  FastDivisor k_tiles, row_tiles, x_chunks, blocks;
};

/// Shared memory of CutByCost.
struct Cuts {
  uint32_t warp_costs[kWarps];
  int units[2];
};

/// What a slot costs: each of its units, and to begin with its rows of x.
struct SlotCost {
  uint32_t unit, begin;
};

__device__ inline SlotCost CostOf(const CudaGemmArgs& args, const Plan& plan, int slot) {
  const auto rows_of = [&](int i) {
    RowTile tile;
    GetRowTile(args, i, &tile);
    return tile.row_count;
  };
  const int rows = rows_of(slot);
  const bool fits = slot == 0 || rows_of(slot - 1) + rows <= plan.rows;
  return {rows > 8 ? kManyCost : kFewCost, fits ? 0u : uint32_t(plan.round_cost)};
}

/// Where this block's units begin and end, so that all blocks have the same costs. All threads take part; each has some neighbouring
/// slots, usually one.
__device__ inline void CutByCost(const CudaGemmArgs& args, const Plan& plan, int slots, Cuts& cuts,
                                 int* begin, int* end) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int per_thread = (slots + kThreads - 1) / kThreads;
  const int first = threadIdx.x * per_thread, last = min(first + per_thread, slots);
  const auto whole = [&](SlotCost cost) {
    return cost.begin + cost.unit * uint32_t(args.row_tiles);
  };
  const SlotCost of_first = first < slots ? CostOf(args, plan, first) : SlotCost{};
  const auto cost_of = [&](int slot) {
    return slot == first ? of_first : CostOf(args, plan, slot);
  };
  uint32_t cost = 0;
  for (int slot = first; slot < last; ++slot) cost += whole(cost_of(slot));
  uint32_t sum = cost;  // of this thread and those before it
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffff, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) cuts.warp_costs[warp] = sum;
  __syncthreads();
  const uint32_t others = lane < kWarps ? cuts.warp_costs[lane] : 0;
  const uint32_t all = __reduce_add_sync(0xffffffff, others);
  uint32_t before = __reduce_add_sync(0xffffffff, lane < warp ? others : 0) + sum - cost;
  const uint32_t share = plan.blocks.Divide(int(all)), rest = all - share * gridDim.x;
  const auto cut = [&](uint32_t block) { return share * block + min(block, rest); };
  const uint32_t from[2] = {cut(blockIdx.x), cut(blockIdx.x + 1)};
  for (int slot = first; slot < last; ++slot) {
    const SlotCost mine = cost_of(slot);
    const uint32_t after = before + whole(mine);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (from[i] < before || from[i] >= after) continue;
      const uint32_t inside = from[i] - min(before + mine.begin, from[i]);
      // Units that begin before the cut are not cut off.
      const uint32_t units = mine.unit == kFewCost ? (inside + kFewCost - 1) / kFewCost
                                                   : (inside + kManyCost - 1) / kManyCost;
      cuts.units[i] = slot * args.row_tiles + int(units);
    }
    before = after;
  }
  __syncthreads();
  *begin = from[0] == all ? slots * args.row_tiles : cuts.units[0];
  *end = from[1] == all ? slots * args.row_tiles : cuts.units[1];
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

/// Quantises what this thread's copies of StageX have brought.
template <class T>
__device__ void QuantizeX(const CudaGemmArgs& args, const Plan& plan, const RowTile* tiles,
                          int slots, char* shared) {
  const int chunks = (args.k + kTileK - 1) / kTileK * 8, lane = threadIdx.x % 32;
  for (int slot = 0; slot < slots; shared += tiles[slot++].row_count * plan.row_stride) {
    const int all = tiles[slot].row_count * chunks;
    for (int first = threadIdx.x - lane; first < all; first += kThreads) {
      const int index = min(first + lane, all - 1);
      const bool valid = index == first + lane;  // whole warps take part
      const int row = plan.x_chunks.Divide(index), k = (index - row * chunks) * 8;
      auto& chunk = *reinterpret_cast<Vector<T, 8>*>(shared + row * plan.row_stride + k * 2);
      Vector<T, 8> v{};
      if (valid) v = chunk;
      if (args.x_quant == ActivationQuant::kMxFp8)
        QuantizeMx(v.values);
      else
        QuantizeFp8(v.values, args.x_scales[tiles[slot].expert]);
      if (valid) chunk = v;
    }
  }
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

/// The same by way of shared memory, [2, 16], where registers are few: copies that belong to the next committed group, and what
/// they have brought.
inline constexpr int kUnitEndBytes = 2 * kTileRows * int(sizeof(float));

__device__ inline void CopyUnitEnd(const CudaGemmArgs& args, int expert, int row_tile, int lane,
                                   uint32_t shared) {
  const int64_t at = (int64_t(expert) * args.row_tiles + row_tile) * kTileRows + lane % 4 * 4;
  if (lane < 4) CopyAsync<16>(shared + lane * 16, args.row_scales + at);
  if (lane / 4 == 1 && args.bias != nullptr) CopyAsync<16>(shared + lane * 16, args.bias + at);
}

__device__ inline UnitEnd ReadUnitEnd(const CudaGemmArgs& args, int lane, uint32_t shared) {
  const auto read = [&](uint32_t at) {
    const uint2 v = LoadShared8(shared + at + lane / 4 * 8);
    return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
  };
  UnitEnd end{read(0), make_float2(0.0f, 0.0f)};
  if (args.bias != nullptr) end.bias = read(kTileRows * int(sizeof(float)));
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
