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
  int row_token[kFusedRows];   // of each sorted row
  RowTile tiles[kFusedRows];   // of each slot
  // Of a single token:
  float scales[kFusedRows];                 // [k], in fc2
  alignas(16) int64_t keys[kFusedExperts];  // of experts, in fc1
};

/// How many of 32 keys are larger. All are below 2^63: a difference's sign takes fewer instructions than a comparison.
__device__ inline int CountLarger(const int64_t* keys, int64_t key) {
  int larger = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) larger += int(uint64_t(key - keys[i]) >> 63);
  return larger;
}

/// Of fc1 for one token: the tiles of its routed experts. Each warp counts for 32 experts how many of them come before it, and then all
/// count among the first ones of each warp.
__device__ inline void OrderExperts(const RouteArgs& route, RouteTable& table) {
  const int experts = route.experts - route.shared, topk = route.topk - route.shared;
  const int thread = threadIdx.x, warp = thread / 32;
  const int warps = (experts + 31) / 32, kept = min(topk, 32), candidates = warps * kept;
  const auto place = [&](int64_t key, int before) {
    if (before < topk)
      table.tiles[before] = {kFusedExperts - 1 - int(key % kFusedExperts), before, 1};
  };
  int64_t key = 0;
  int before = 0;
  if (warp < warps) {
    // No two are equal: of equal logits the lower index has the larger key. Experts that do not exist are below all.
    if (thread < experts) key = OrderedKey(LoadAsFloat(route.logits, route.logits_dtype, thread));
    key = key * kFusedExperts + (kFusedExperts - 1 - thread);
    table.keys[thread] = key;
    __syncwarp();
    before = CountLarger(table.keys + warp * 32, key);
  }
  if (warps == 1) {
    if (warp == 0) place(key, before);
    return;
  }
  __syncthreads();  // all have read before any writes
  if (warp < warps && before < kept) table.keys[warp * kept + before] = key;
  if (thread >= candidates && thread < kFusedExperts) table.keys[thread] = 0;
  __syncthreads();
  if (thread >= candidates) return;
  key = table.keys[thread];
  before = 0;
  for (int first = 0; first < candidates; first += 32)
    before += CountLarger(table.keys + first, key);
  place(key, before);
}

/// RouteInBlock for one token. Slots are its experts as routing orders them; there are route.topk of them.
///
/// In fc2, which starts while fc1 runs, the first warp routes. fc1 cannot read a weight before it knows the experts, and needs no
/// scales: all threads together find them.
__device__ inline void RouteOneToken(const FusedRoute& args, RouteTable& table) {
  const RouteArgs& route = args.route;
  const int thread = threadIdx.x, routed = route.topk - route.shared;
  if (args.output != nullptr) {
    if (thread < 32)
      TokenRouter<kFusedExperts / 32>(route, 0, thread).Run(table.expert_ids, table.scales);
    __syncthreads();
    if (thread < route.topk) table.tiles[thread] = {table.expert_ids[thread], thread, 1};
  } else {
    OrderExperts(route, table);
    if (thread < route.shared)
      table.tiles[routed + thread] = {route.experts - route.shared + thread, routed + thread, 1};
  }
  if (thread < route.topk) table.row_token[thread] = 0;
  __syncthreads();
}

/// For fc1: clears the counts of what is done in fc2, which starts to count when fc1 has ended.
__device__ inline void ClearArrivals(const FusedRoute& args) {
  if (blockIdx.x != 0) return;
  for (int i = threadIdx.x; i < args.arrival_count; i += blockDim.x) args.arrivals[i] = 0;
}

/// For fc1, before fc2 may start: what is in args.shared is of an earlier run.
__device__ inline void WithdrawRoute(const FusedRoute& args) {
  if (args.shared == nullptr || !args.x_is_tokens || blockIdx.x != 0) return;
  if (threadIdx.x == 0) {
    args.shared->slots = 0;
    __threadfence();
  }
  __syncthreads();
}

/// For fc2, whose blocks start when fc1's end: by then its first block has routed long ago. False if not; nothing is waited for.
__device__ inline bool ReadRoute(const FusedRoute& args, RouteTable& table) {
  if (args.shared == nullptr || args.x_is_tokens) return false;
  if (threadIdx.x == 0) table.slots = AddAcquireRelease(&args.shared->slots, 0);
  __syncthreads();
  if (table.slots == 0) return false;
  constexpr int kInts = sizeof(RowTile) / sizeof(int);
  for (int i = threadIdx.x; i < table.slots * kInts; i += blockDim.x)
    reinterpret_cast<int*>(table.tiles)[i] =
        LoadL2(reinterpret_cast<const int*>(args.shared->tiles) + i);
  __syncthreads();
  return true;
}

/// Threads that look together for a row's place among the others, eight others each.
inline constexpr int kRankParts = kFusedRows / 8;

/// Fills the table; all threads of the block take part, at least kFusedTokens warps and kFusedRows * kRankParts threads. The first
/// block also writes the scales and the sorted rows to global memory if it has places for them, and fc1's what fc2 wants to know.
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
  if (const int row = thread / kRankParts; thread < kFusedRows * kRankParts) {
    const int expert = table.expert_ids[row];
    // Rows of lower experts, of this one before this row, and of this one: up to 64 each, in a byte each.
    uint32_t counts = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int other_row = thread % kRankParts * 8 + i, other = table.expert_ids[other_row];
      if (other_row >= rows) continue;
      counts += other < expert ? 1 : 0;
      counts += other != expert ? 0 : other_row < row ? 0x10100 : 0x10000;
    }
#pragma unroll
    for (int part = 1; part < kRankParts; part *= 2)
      counts += __shfl_xor_sync(0xffffffff, counts, part);
    if (thread % kRankParts == 0 && row < rows) {
      const int before = int(counts >> 8 & 0xff), rank = int(counts & 0xff) + before;
      table.row_token[rank] = row / route.topk;
      // The first row of an expert stands for its slot: parked at its sorted row until slots are counted.
      table.tiles[rank] = {expert, rank, before == 0 ? int(counts >> 16) : 0};
      if (blockIdx.x == 0 && args.sorted_row != nullptr) args.sorted_row[row] = rank;
    }
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
  if (args.shared == nullptr || !args.x_is_tokens || blockIdx.x != 0) return;
  if (thread < table.slots) {
    args.shared->tiles[thread] = table.tiles[thread];
    __threadfence();
  }
  __syncthreads();
  if (thread == 0) AddAcquireRelease(&args.shared->slots, table.slots);
}

}  // namespace qmoe_plugin
