#include "ops/qmoe/permute.cuh"

#include "ops/common/cuda_host.h"
#include "ops/common/ptx.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kThreads = 1024;  // of a block; also the largest number of experts
constexpr int kWarps = kThreads / 32;
constexpr int kGatherThreads = 256;
constexpr int kFewRows = 256;  // so many rows are placed by permute_offsets itself

__device__ int InclusiveWarpScan(int x, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int y = __shfl_up_sync(0xffffffff, x, offset);
    if (lane >= offset) x += y;
  }
  return x;
}

/// Sum of x over the threads before this one. `warp_sums` is shared memory, free again when the
/// next barrier is passed.
__device__ int ExclusiveBlockScan(int x, int (&warp_sums)[kWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int inclusive = InclusiveWarpScan(x, lane);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const int before = __reduce_add_sync(0xffffffff, lane < warp ? warp_sums[lane] : 0);
  return before + inclusive - x;
}

__device__ void PlaceRow(const PermuteArgs& args, int row, int sorted) {
  args.sorted_row[row] = sorted;
  args.row_token[sorted] = row / args.topk;
}

/// Writes the row tiles of expert threadIdx.x, whose rows are [offset, offset + count). They are about equally large: a small rest
/// would cost nearly as much as a whole tile.
__device__ void WriteTiles(const RowTileList& list, int experts, int offset, int count,
                           int (&warp_sums)[kWarps]) {
  const int fewest = max(1, (count + list.tile_rows - 1) / list.tile_rows);
  const int size = min(list.tile_rows, ((count + fewest - 1) / fewest + 7) / 8 * 8);
  const int tiles = count == 0 ? 0 : (count + size - 1) / size;
  const int first = ExclusiveBlockScan(tiles, warp_sums);
  for (int i = 0; i < tiles; ++i) {
    const int begin = i * size;
    list.tiles[first + i] = {int(threadIdx.x), offset + begin, min(size, count - begin)};
  }
  if (threadIdx.x == 0) *list.next_item = 0;
  if (threadIdx.x == experts - 1) *list.count = first + tiles;
}

/// One block: counts the rows of each expert, thread e is expert e; offsets and tiles follow by
/// prefix sums.
__global__ void __launch_bounds__(kThreads) permute_offsets(const PermuteArgs args) {
  __shared__ int counts[kThreads];  // rows, later the first sorted row
  __shared__ int few_ids[kFewRows];
  __shared__ int warp_sums[3][kWarps];
  counts[threadIdx.x] = 0;
  __syncthreads();
  LetNextStart();
  WaitForPrevious();
  for (int row = threadIdx.x; row < args.rows; row += kThreads) {
    const int expert = args.expert_ids[row];
    if (row < kFewRows) few_ids[row] = expert;
    atomicAdd(&counts[expert], 1);  // integers: any order gives the same sum
  }
  __syncthreads();
  const int count = counts[threadIdx.x];
  const int offset = ExclusiveBlockScan(count, warp_sums[0]);
  if (threadIdx.x < args.experts) args.expert_offsets[threadIdx.x] = offset;
  if (threadIdx.x == 0) args.expert_offsets[args.experts] = args.rows;
  WriteTiles(args.fc1, args.experts, offset, count, warp_sums[1]);
  WriteTiles(args.fc2, args.experts, offset, count, warp_sums[2]);

  if (args.rows > kFewRows) return;  // permute_rows does the rest
  counts[threadIdx.x] = offset;
  __syncthreads();
  if (threadIdx.x >= args.rows) return;
  const int row = threadIdx.x, expert = few_ids[row];
  int rank = 0;
  for (int earlier = 0; earlier < row; ++earlier) rank += few_ids[earlier] == expert;
  PlaceRow(args, row, counts[expert] + rank);
}

/// Block e places the rows of expert e, in order.
__global__ void __launch_bounds__(kThreads) permute_rows(const PermuteArgs args) {
  __shared__ int warp_counts[2][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, expert = blockIdx.x;
  LetNextStart();
  WaitForPrevious();
  int next = args.expert_offsets[expert];
  const int end = args.expert_offsets[expert + 1];
  for (int first = 0, turn = 0; next < end; first += kThreads, turn ^= 1) {
    const int row = first + threadIdx.x;
    const bool mine = row < args.rows && args.expert_ids[row] == expert;
    const unsigned mask = __ballot_sync(0xffffffff, mine);
    // Two buffers: a warp may be one turn ahead of another, never two.
    if (lane == 0) warp_counts[turn][warp] = __popc(mask);
    __syncthreads();
    const int count = warp_counts[turn][lane];
    const int before = __reduce_add_sync(0xffffffff, lane < warp ? count : 0);
    if (mine) PlaceRow(args, row, next + before + __popc(mask & ((1u << lane) - 1)));
    next += __reduce_add_sync(0xffffffff, count);
  }
}

/// A block a row.
template <class Vector>
__global__ void __launch_bounds__(kGatherThreads) gather_rows(const GatherArgs args) {
  const int vectors = args.columns * 2 / int(sizeof(Vector));
  const int64_t row = blockIdx.x;
  LetNextStart();
  WaitForPrevious();
  const Vector* from = static_cast<const Vector*>(args.x) + args.row_token[row] * int64_t(vectors);
  Vector* to = static_cast<Vector*>(args.y) + row * vectors;
  for (int i = threadIdx.x; i < vectors; i += kGatherThreads) to[i] = from[i];
}

/// fn(kernel) for the widest vectors that fit.
template <class Fn>
void WithGather(bool vectors, Fn&& fn) {
  vectors ? fn(&gather_rows<uint4>) : fn(&gather_rows<uint16_t>);
}

}  // namespace

void LaunchGather(const GatherArgs& args, cudaStream_t stream) {
  const bool vectors = (reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.y) |
                        uint64_t(args.columns) * 2) %
                           16 ==
                       0;
  WithGather(vectors, [&](auto* kernel) {
    Launch("gather_rows", kernel, args.rows, kGatherThreads, 0, args.overlap, stream, args);
  });
}

void LaunchPermute(const PermuteArgs& args, cudaStream_t stream) {
  Launch("permute_offsets", &permute_offsets, 1, kThreads, 0, args.overlap, stream, args);
  if (args.rows > kFewRows)
    Launch("permute_rows", &permute_rows, args.experts, kThreads, 0, args.overlap, stream, args);
}

void PreparePermute() {
  PrepareKernel("permute_offsets", reinterpret_cast<const void*>(&permute_offsets));
  PrepareKernel("permute_rows", reinterpret_cast<const void*>(&permute_rows));
  for (bool vectors : {false, true})
    WithGather(vectors, [](auto* kernel) {
      PrepareKernel("gather_rows", reinterpret_cast<const void*>(kernel));
    });
}

}  // namespace qmoe_plugin
