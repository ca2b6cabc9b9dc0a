// Routing inside a GEMM kernel, for few tokens: each block finds for itself which experts work on which rows, so that no
// kernels have to run before, and so that the blocks of fc2 know it while fc1 still runs.
//
// Slots are the experts that have any rows, in order; their rows are sorted by expert, then token. That is what route and
// permute (ops/qmoe) make of many tokens.
#pragma once

#include "ops/gemm/gemm.cuh"
#include "ops/qmoe/route_token.cuh"

namespace qmoe_plugin {

/// What a block knows of its launch's rows; in shared memory.
struct RouteTable {
  int slots;
  int expert_ids[kFusedRows];  // [T, k]
  int sorted_row[kFusedRows];  // [T, k]
  int row_token[kFusedRows];   // of each sorted row
  RowTile tiles[kFusedRows];   // of each slot
  // Of a single token:
  float scales[kFusedRows];      // [k], in fc2
  uint32_t keys[kFusedExperts];  // of the logits, in fc1
};

__device__ inline bool IsOneToken(const FusedRoute& args) {
  return args.enabled && args.route.tokens == 1;
}

/// RouteInBlock for one token. Slots are its experts as routing orders them; there are route.topk of them.
///
/// In fc2, which starts while fc1 runs, the first warp routes. fc1 cannot read a weight before it knows the experts, and needs no
/// scales: all threads together count for each expert those that come before it.
__device__ inline void RouteOneToken(const FusedRoute& args, RouteTable& table) {
  const RouteArgs& route = args.route;
  const int thread = threadIdx.x, topk = route.topk - route.shared;
  if (args.output != nullptr) {
    if (thread < 32)
      TokenRouter<kFusedExperts / 32>(route, 0, thread).Run(table.expert_ids, table.scales);
    __syncthreads();
    if (thread < route.topk) table.tiles[thread] = {table.expert_ids[thread], thread, 1};
  } else {
    const int experts = route.experts - route.shared;
    if (thread < experts)
      table.keys[thread] = OrderedKey(LoadAsFloat(route.logits, route.logits_dtype, thread));
    __syncthreads();
    constexpr int kLanes = 4;  // that share an expert
    for (int first = 0; first < experts; first += blockDim.x / kLanes) {
      const int expert = first + thread / kLanes;
      const uint32_t key = expert < experts ? table.keys[expert] : 0;
      int before = 0;
      for (int other = thread % kLanes; other < experts; other += kLanes)
        before += table.keys[other] > key || (table.keys[other] == key && other < expert);
      before += __shfl_xor_sync(0xffffffff, before, 1);
      before += __shfl_xor_sync(0xffffffff, before, 2);
      if (expert < experts && before < topk && thread % kLanes == 0)
        table.tiles[before] = {expert, before, 1};
    }
    if (thread < route.shared) table.tiles[topk + thread] = {experts + thread, topk + thread, 1};
  }
  if (thread < route.topk) table.row_token[thread] = 0;
  __syncthreads();
}

/// For fc1: clears the counts of what is done in fc2, which starts to count when fc1 has ended.
__device__ inline void ClearArrivals(const FusedRoute& args) {
  if (args.arrivals == nullptr || args.output != nullptr || blockIdx.x != 0) return;
  for (int i = threadIdx.x; i < args.arrival_count; i += blockDim.x) args.arrivals[i] = 0;
}

/// Fills the table; all threads of the block take part, at least kFusedTokens warps. The first block also writes the scales
/// and the sorted rows of args.route to global memory if it has places for them.
__device__ inline void RouteInBlock(const FusedRoute& args, RouteTable& table) {
  const RouteArgs& route = args.route;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int rows = route.tokens * route.topk;
  if (warp < route.tokens) {
    const bool publish = blockIdx.x == 0 && route.scales != nullptr;
    TokenRouter<kFusedExperts / 32>(route, warp, lane)
        .Run(table.expert_ids + warp * route.topk,
             publish ? route.scales + warp * route.topk : nullptr);
  }
  __syncthreads();
  if (thread < rows) {
    const int expert = table.expert_ids[thread];
    int rank = 0, of_expert = 0, before = 0;
    for (int row = 0; row < rows; ++row) {
      const int other = table.expert_ids[row];
      rank += other < expert || (other == expert && row < thread);
      of_expert += other == expert;
      before += other == expert && row < thread;
    }
    table.sorted_row[thread] = rank;
    table.row_token[rank] = thread / route.topk;
    // The first row of an expert stands for its slot: parked at its sorted row until slots are counted.
    table.tiles[rank] = {expert, rank, before == 0 ? of_expert : 0};
    if (blockIdx.x == 0 && args.sorted_row != nullptr) args.sorted_row[thread] = rank;
  }
  __syncthreads();
  if (warp == 0) {
    RowTile mine[kFusedRows / 32];
    unsigned firsts[kFusedRows / 32];
    int slots = 0;
#pragma unroll
    for (int i = 0; i < kFusedRows / 32; ++i) {
      const int row = lane + 32 * i;
      mine[i] = row < rows ? table.tiles[row] : RowTile{};
      firsts[i] = __ballot_sync(0xffffffff, row < rows && mine[i].row_count > 0);
    }
    __syncwarp();  // all have read before any writes: a ballot orders no memory accesses
#pragma unroll
    for (int i = 0; i < kFusedRows / 32; ++i) {
      if (firsts[i] >> lane & 1)
        table.tiles[slots + __popc(firsts[i] & ((1u << lane) - 1))] = mine[i];
      slots += __popc(firsts[i]);
    }
    if (lane == 0) table.slots = slots;
  }
  __syncthreads();
}

}  // namespace qmoe_plugin
