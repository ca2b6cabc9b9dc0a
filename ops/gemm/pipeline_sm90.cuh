// How weights and rows of x come into shared memory in grouped_gemm_sm90: a ring of stages that one warpgroup fills, by tensor copies
// and cp.async, and others empty. Barriers say when a stage is full and when it is empty again; loading runs ahead across work items.
#pragma once

#include "ops/common/hopper.cuh"
#include "ops/common/tile.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::grouped_gemm_sm90 {

inline constexpr int kConsumers = 2;  // warpgroups that multiply
inline constexpr int kGroup = 128;    // threads of a warpgroup
inline constexpr int kThreads = kGroup * (1 + kConsumers);
inline constexpr int kSteps = 2;                // k16 steps that are decoded at once
inline constexpr int kMaxBlocks = kTileK / 16;  // quantization blocks in a k tile, at most
inline constexpr int kTileScaleBytes = kMaxBlocks * kTileRows * 2;  // at most
/// Sums on their way out, [16, 32] a warp; + 8: no bank conflicts.
inline constexpr int kStagedStride = 32 + 8, kStagedFloats = kTileRows * kStagedStride;

/// A stage of the pipeline in shared memory, and what follows from its size. kRows: rows of x in a tile, 32 or 128; kStacks: stacks
/// of 64 weight rows of each consumer.
template <class F, int kRows, int kStacks, bool kOffsets>
struct Stage {
  static constexpr int kTiles = kConsumers * kStacks * 4;  // weight row tiles of the block
  static constexpr int kX = 0;
  static constexpr int kCodes = kX + kRows * kTileK * 2;
  static constexpr int kScales = kCodes + kTiles * TileBytes(F::kBits);
  static constexpr int kZeros = kScales + kTiles * kTileScaleBytes;
  static constexpr int kUsed = kZeros + (kOffsets ? kTiles * kTileScaleBytes : 0);
  static constexpr int kBytes = (kUsed + 1023) / 1024 * 1024;  // operand B wants its alignment
  // In front of the stages: barriers, staged sums. And up to 1023 bytes to align.
  static constexpr int kStaged = 256;
  static constexpr int kFront =
      (kStaged + kConsumers * 4 * kStagedFloats * int(sizeof(float)) + 1023) / 1024 * 1024;
  /// Stages that fit if so many blocks share a multiprocessor.
  static constexpr int Fit(int blocks) {
    const int stages = ((227 << 10) / blocks - 1024 - 1024 - kFront) / kBytes;
    return stages < 6 ? stages : 6;
  }
  static constexpr int kBlocksPerSm = kRows <= 32 && Fit(2) >= 4 ? 2 : 1;
  static constexpr int kStages = Fit(kBlocksPerSm);
  static_assert(kStages >= 3);
  static constexpr int kSharedBytes = 1024 + kFront + kStages * kBytes;
  /// Registers of a thread that loads, and of one that multiplies: together what all were launched with, or they would wait for
  /// each other forever.
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kBlocksPerSm) / 8 * 8;
  static constexpr int kLoadRegisters = kBlocksPerSm == 2 ? 32 : 40;
  static constexpr int kMultiplyRegisters = kBlocksPerSm == 2 ? 104 : 232;
  static_assert(kLoadRegisters + kConsumers * kMultiplyRegisters <=
                (1 + kConsumers) * kLaunchRegisters);
};

/// Counts through the ring of stages.
template <int kStages>
struct RingIndex {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    const bool wraps = ++stage == kStages;
    stage = wraps ? 0 : stage;
    parity ^= wraps;
  }
  __device__ int Previous() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

/// The barriers of the ring: stage s is full, and is empty again.
struct Barriers {
  uint32_t base;
  __device__ uint32_t Full(int stage) const { return base + stage * 16; }
  __device__ uint32_t Empty(int stage) const { return base + stage * 16 + 8; }
};

/// Work items: (row tile, block of kBlockTiles weight row tiles), weights first, so that blocks that run at once share x and experts.
/// Block b takes items b, b + grid, ...
template <int kBlockTiles>
class Items {
 public:
  __device__ explicit Items(const CudaGemmArgs& args)
      : args_(args), weight_blocks_((args.row_tiles + kBlockTiles - 1) / kBlockTiles) {}

  /// Of an item; false beyond the last.
  __device__ bool Rows(unsigned item, RowTile* tile) const {
    const unsigned index = item / weight_blocks_;
    return index < args_.max_tiles && GetRowTile(args_, index, tile);
  }
  __device__ int FirstRowTile(unsigned item) const {
    return int(item % weight_blocks_) * kBlockTiles;
  }

 private:
  const CudaGemmArgs& args_;
  unsigned weight_blocks_;
};

/// How x comes into a stage: by tensor copies (its rows lie in order), or gathered in 16-byte chunks, or in single values.
enum class XSource { kTensor, kChunks, kValues };

/// The matrices that tensor copies read. A row of codes, scales and zero offsets is a row tile of weights.
struct Tensors {
  CUtensorMap codes, scales, zeros;
  CUtensorMap x;  // for XSource::kTensor
  XSource x_source;
  uint32_t scale_bytes;  // block scales of a row tile in a k tile
};

/// 8 values of 16 bits that need not be 16-byte aligned; zeros unless valid.
__device__ inline uint4 LoadUnaligned(const void* values, bool valid) {
  if (!valid) return {};
  const auto* v = static_cast<const uint16_t*>(values);
  const auto pair = [&](int i) { return v[i] | uint32_t(v[i + 1]) << 16; };
  return make_uint4(pair(0), pair(2), pair(4), pair(6));
}

/// The loading warpgroup. The first thread brings weights (and x) by tensor copies; x is gathered by all, a thread having one
/// 16-byte chunk of every 16th row.
template <class F, class T, int kRows, int kStacks, bool kOffsets, XSource kSource>
__device__ void Produce(const CudaGemmArgs& args, const Tensors& tensors, uint32_t stages,
                        Barriers barriers) {
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  constexpr int kBoxBytes = kRows / 2 * kTileK * 2;
  constexpr int kPerThread = kSource == XSource::kTensor ? 1 : kRows / 16;
  const bool first = threadIdx.x == 0;
  if (kSource == XSource::kTensor && !first) return;
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const uint32_t to_x = Layout::kX + row * (kTileK * 2) + ((chunk ^ (row & 7)) * 16);
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
  const bool scaled = args.block_scales != nullptr;
  const uint32_t weight_bytes =
      Layout::kTiles *
      (TileBytes(F::kBits) + tensors.scale_bytes * ((scaled ? 1 : 0) + (kOffsets ? 1 : 0)));
  RingIndex<Layout::kStages> ring;

  const Items<Layout::kTiles> items(args);
  RowTile tile;
  for (unsigned item = blockIdx.x; items.Rows(item, &tile); item += gridDim.x) {
    const char* from[kPerThread];  // this thread's chunks of x
    if constexpr (kSource != XSource::kTensor) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        from[i] = reinterpret_cast<const char*>(
            XRow<T>(args, tile.row_begin + min(row + 16 * i, tile.row_count - 1)) + chunk * 8);
    }
    const int weight_row = tile.expert * args.row_tiles + items.FirstRowTile(item);
    const int boxes = kSource != XSource::kTensor ? 0 : tile.row_count > kRows / 2 ? 2 : 1;
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const uint32_t full = barriers.Full(ring.stage);
      const uint32_t stage = stages + ring.stage * Layout::kBytes;
      BarrierWait(barriers.Empty(ring.stage), ring.parity ^ 1);
      if (first) {
        BarrierArriveExpecting(full, weight_bytes + boxes * kBoxBytes);
        TensorCopy(stage + Layout::kCodes, tensors.codes, k_tile * (TileBytes(F::kBits) / 8),
                   weight_row, full);
        const int column = ((k_tile * kTileK) >> args.block_shift) * kTileRows;
        if (scaled) TensorCopy(stage + Layout::kScales, tensors.scales, column, weight_row, full);
        if constexpr (kOffsets)
          TensorCopy(stage + Layout::kZeros, tensors.zeros, column, weight_row, full);
        for (int box = 0; box < boxes; ++box)
          TensorCopy(stage + Layout::kX + box * kBoxBytes, tensors.x, k_tile * kTileK,
                     tile.row_begin + box * (kRows / 2), full);
      }
      if constexpr (kSource != XSource::kTensor) {
        const bool valid = k_tile * kTileK + chunk * 8 < args.k;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          const uint32_t to = stage + to_x + i * (16 * kTileK * 2);
          if (16 * i < tile.row_count) {
            if constexpr (kSource == XSource::kChunks)
              CopyAsync16(to, from[i], valid);
            else
              StoreShared16(to, LoadUnaligned(from[i], valid));
          }
          from[i] += kTileK * sizeof(T);
        }
        if constexpr (kSource == XSource::kChunks) {
          BarrierArriveAfterCopies(full);
        } else {
          FenceAsyncProxy();
          BarrierArrive(full);
        }
      }
      ring.Next();
    }
  }
}

}  // namespace qmoe_plugin::grouped_gemm_sm90
