// A block places the rows of a slice of tokens and copies them there: from the numbers of rows that all slices have of each
// expert (counted by `route`) it knows where its own begin. One block more writes the experts' offsets and the row tiles.
#include "ops/qmoe/permute.cuh"

#include <algorithm>

#include "ops/common/cuda_host.h"
#include "ops/common/fast_divisor.cuh"
#include "ops/common/ptx.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kMaxThreads = 1024;  // of a block; also the most experts
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kBusyThreads = 512;  // at most, to count and copy: they fit in beside `route`
constexpr int kCountsAtOnce = 16, kVectorsAtOnce = 4;  // loads of a thread that are on their way

/// Tokens of a slice are placed in rounds: a bit for each token, a thread for each row.
struct Rounds {
  int tokens;   // of a round, up to 32
  int vectors;  // of a row of x
  FastDivisor by_vectors;
};

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
__device__ int ExclusiveBlockScan(int x, int (&warp_sums)[kMaxWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int inclusive = InclusiveWarpScan(x, lane);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const int before = __reduce_add_sync(0xffffffff, lane < warp ? warp_sums[lane] : 0);
  return before + inclusive - x;
}

/// Writes the row tiles of expert threadIdx.x, whose rows are [offset, offset + count). They are about equally large: a small rest
/// would cost nearly as much as a whole tile.
__device__ void WriteTiles(const RowTileList& list, int experts, int offset, int count,
                           int (&warp_sums)[kMaxWarps]) {
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

/// Adds the rows of each expert to `all`, and those in slices before this block's to `before`.
__device__ void AddCounts(const PermuteArgs& args, int* all, int* before) {
  const int width = (args.experts + 31) / 32 * 32;  // lanes of a warp have different experts
  const int expert = threadIdx.x % width, part = threadIdx.x / width, parts = blockDim.x / width;
  if (expert >= args.experts || part >= parts) return;
  const int slices = Slices(args.tokens);
  int sum = 0, sum_before = 0;
  for (int first = part; first < slices; first += kCountsAtOnce * parts) {
    int counts[kCountsAtOnce];
#pragma unroll
    for (int i = 0; i < kCountsAtOnce; ++i) {
      const int slice = first + i * parts;
      counts[i] = slice < slices ? args.slice_counts[slice * args.experts + expert] : 0;
    }
#pragma unroll
    for (int i = 0; i < kCountsAtOnce; ++i) {
      sum += counts[i];
      if (first + i * parts < int(blockIdx.x)) sum_before += counts[i];
    }
  }
  atomicAdd(&all[expert], sum);  // integers: any order gives the same
  atomicAdd(&before[expert], sum_before);
}

/// Copies rows [0, tokens) of x to their `places`, [tokens, k].
template <class Vector>
__device__ void CopyRows(const Rounds& rounds, const Vector* x, int tokens, int topk,
                         const int* places, Vector* sorted) {
  const int total = tokens * rounds.vectors;
  for (int first = threadIdx.x; first < total; first += kVectorsAtOnce * blockDim.x) {
    Vector values[kVectorsAtOnce];
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      const int at = first + i * int(blockDim.x);
      values[i] = at < total ? x[at] : Vector{};
    }
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      const int at = first + i * int(blockDim.x);
      if (at >= total) break;
      const int token = rounds.by_vectors.Divide(at), column = at - token * rounds.vectors;
#pragma unroll 4
      for (int j = 0; j < topk; ++j)
        sorted[places[token * topk + j] * int64_t(rounds.vectors) + column] = values[i];
    }
  }
}

/// Thread e has expert e, and row r of each round.
template <class Vector>
__global__ void __launch_bounds__(kMaxThreads)
    permute(const PermuteArgs args, const Rounds rounds) {
  __shared__ int counts[kMaxThreads];  // rows of each expert
  __shared__ int next[kMaxThreads];    // rows of each expert before; then where its next row goes
  __shared__ unsigned tokens_of[kMaxThreads];  // bit t: token t of the round goes to this expert
  __shared__ int places[kMaxThreads];          // of the round's rows
  __shared__ int warp_sums[3][kMaxWarps];
  const int token = threadIdx.x / args.topk;  // of the round
  const int slice_tokens = SliceTokens(args.tokens), begin = blockIdx.x * slice_tokens;
  const int end = min(begin + slice_tokens, args.tokens);
  counts[threadIdx.x] = next[threadIdx.x] = tokens_of[threadIdx.x] = 0;
  __syncthreads();
  LetNextStart();
  WaitForPrevious();
  const auto load_expert = [&](int first) {  // of this thread's row
    const bool valid = token < min(rounds.tokens, end - first);
    return valid ? args.expert_ids[first * args.topk + int(threadIdx.x)] : -1;
  };
  int expert = load_expert(begin);
  AddCounts(args, counts, next);
  __syncthreads();
  const int count = counts[threadIdx.x];
  const int offset = ExclusiveBlockScan(count, warp_sums[0]);
  if (blockIdx.x == gridDim.x - 1) {
    if (threadIdx.x < args.experts) args.expert_offsets[threadIdx.x] = offset;
    if (threadIdx.x == 0) args.expert_offsets[args.experts] = args.tokens * args.topk;
    WriteTiles(args.fc1, args.experts, offset, count, warp_sums[1]);
    WriteTiles(args.fc2, args.experts, offset, count, warp_sums[2]);
    return;
  }

  next[threadIdx.x] += offset;
  for (int first = begin; first < end; first += rounds.tokens) {
    if (expert >= 0) atomicOr(&tokens_of[expert], 1u << token);
    __syncthreads();
    if (expert >= 0) {
      const int place = next[expert] + __popc(tokens_of[expert] & ((1u << token) - 1));
      places[threadIdx.x] = place;
      args.sorted_row[first * args.topk + threadIdx.x] = place;
      args.row_token[place] = first + token;
    }
    __syncthreads();
    next[threadIdx.x] += __popc(tokens_of[threadIdx.x]);
    tokens_of[threadIdx.x] = 0;
    expert = load_expert(first + rounds.tokens);
    if (args.sorted != nullptr)
      CopyRows(rounds, static_cast<const Vector*>(args.x) + first * int64_t(rounds.vectors),
               min(rounds.tokens, end - first), args.topk, places,
               static_cast<Vector*>(args.sorted));
    __syncthreads();
  }
}

/// fn(kernel, bytes of its vectors) for the widest vectors that fit.
template <class Fn>
void WithKernel(bool vectors, Fn&& fn) {
  vectors ? fn(&permute<uint4>, 16) : fn(&permute<uint16_t>, 2);
}

Rounds RoundsOf(const PermuteArgs& args, int vector_bytes) {
  constexpr int kMaxVectors = 1 << 30;  // of a round
  Rounds rounds;
  rounds.vectors = int(args.row_bytes / vector_bytes);
  rounds.by_vectors = FastDivisor(uint32_t(rounds.vectors));
  rounds.tokens = std::min({32, SliceTokens(args.tokens), kMaxThreads / args.topk,
                            std::max(1, kMaxVectors / rounds.vectors)});
  return rounds;
}

int ThreadsFor(const PermuteArgs& args, const Rounds& rounds) {
  const int counts = args.experts * Slices(args.tokens) / kCountsAtOnce;
  const int copies = args.sorted != nullptr ? rounds.tokens * rounds.vectors / kVectorsAtOnce : 0;
  const int threads = std::max(
      {args.experts, rounds.tokens * args.topk, std::min(std::max(counts, copies), kBusyThreads)});
  return (threads + 31) / 32 * 32;
}

}  // namespace

void LaunchPermute(const PermuteArgs& args, cudaStream_t stream) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.sorted);
  WithKernel((addresses | uintptr_t(args.row_bytes)) % 16 == 0, [&](auto* kernel, int bytes) {
    const Rounds rounds = RoundsOf(args, bytes);
    Launch("permute", kernel, Slices(args.tokens) + 1, ThreadsFor(args, rounds), 0, args.overlap,
           stream, args, rounds);
  });
}

void PreparePermute() {
  for (bool vectors : {false, true})
    WithKernel(vectors, [](auto* kernel, int) {
      PrepareKernel("permute", reinterpret_cast<const void*>(kernel));
    });
}

}  // namespace qmoe_plugin
