// How weights and rows of x come into shared memory in grouped_gemm_sm90: a ring of stages that one warpgroup fills, by tensor copies
// and cp.async, and others empty. Barriers say when a stage is full and when it is empty again; loading runs ahead across work items.
#pragma once

#include <algorithm>

#include "ops/common/hopper.cuh"
#include "ops/common/tile.cuh"
#include "ops/gemm/epilogue_sm90.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::grouped_gemm_sm90 {

inline constexpr int kConsumers = 2;  // warpgroups that multiply
inline constexpr int kGroup = 128;    // threads of a warpgroup
inline constexpr int kThreads = kGroup * (1 + kConsumers);
inline constexpr int kMaxBlocks = kTileK / 16;  // quantization blocks in a k tile, at most
inline constexpr int kTileScaleBytes = kMaxBlocks * kTileRows * 2;  // at most
/// Counts through a ring of stages of so many bytes.
template <int kStages, int kBytes>
struct RingIndex {
  int stage = 0;
  int offset = 0;  // of the stage, in bytes
  uint32_t parity = 0;
  __device__ void Next() {
    const bool wraps = ++stage == kStages;
    stage = wraps ? 0 : stage;
    offset = wraps ? 0 : offset + kBytes;
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
template <int kBlockTiles>
class Items {
 public:
  __device__ explicit Items(const CudaGemmArgs& args)
      : args_(args), weight_blocks_((args.row_tiles + kBlockTiles - 1) / kBlockTiles) {}

  /// Of an item; false beyond the last.
  __device__ bool Rows(int item, RowTile* tile) const {
    const int index = item / weight_blocks_;
    return index < args_.max_tiles && GetRowTile(args_, index, tile);
  }
  __device__ int FirstRowTile(int item) const { return item % weight_blocks_ * kBlockTiles; }

 private:
  const CudaGemmArgs& args_;
  int weight_blocks_;
};

/// In which the loading warpgroup tells the others of a block what they work on, one item after the other. It is up to kSlots ahead.
template <int kBlockTiles>
class WorkQueue {
 public:
  static constexpr int kSlots = 2, kBytes = kSlots * (16 + int(sizeof(Work<kBlockTiles>)));

  __device__ WorkQueue(uint32_t barriers, char* memory)
      : barriers_(barriers), works_(reinterpret_cast<Work<kBlockTiles>*>(memory + kSlots * 16)) {}

  /// One thread of the block; `readers` warps will read.
  __device__ void Init(int readers) const {
    for (int slot = 0; slot < kSlots; ++slot) {
      BarrierInit(Full(slot), 1);
      BarrierInit(Empty(slot), readers);
    }
  }

  /// One thread. Row scales and biases follow in the background.
  __device__ void Push(const CudaGemmArgs& args, const RowTile& rows, int first_row_tile) {
    Work<kBlockTiles>& work = Next();
    const int tiles = min(kBlockTiles, args.row_tiles - first_row_tile);
    const uint32_t bytes = tiles * kTileRows * sizeof(float);
    const int64_t first = (int64_t(rows.expert) * args.row_tiles + first_row_tile) * kTileRows;
    work.rows = rows, work.first_row_tile = first_row_tile;
    BarrierArriveExpecting(Full(slot_), args.bias != nullptr ? 2 * bytes : bytes);
    BulkCopy(SharedAddress(work.scales), args.row_scales + first, bytes, Full(slot_));
    if (args.bias != nullptr)
      BulkCopy(SharedAddress(work.biases), args.bias + first, bytes, Full(slot_));
    Advance();
  }

  /// There are no more items.
  __device__ void PushEnd() {
    Next().rows.row_count = 0;
    BarrierArrive(Full(slot_));
  }

  /// The next item, null at the end. All lanes of a warp; they call Done before the next one.
  __device__ const Work<kBlockTiles>* Pop() const {
    BarrierWait(Full(slot_), parity_);
    return works_[slot_].rows.row_count > 0 ? &works_[slot_] : nullptr;
  }
  __device__ void Done() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(Empty(slot_));
    Advance();
  }

 private:
  __device__ uint32_t Full(int slot) const { return barriers_ + slot * 16; }
  __device__ uint32_t Empty(int slot) const { return barriers_ + slot * 16 + 8; }
  __device__ Work<kBlockTiles>& Next() const {
    BarrierWait(Empty(slot_), parity_ ^ 1);
    return works_[slot_];
  }
  __device__ void Advance() {
    if (++slot_ == kSlots) slot_ = 0, parity_ ^= 1;
  }

  uint32_t barriers_;
  Work<kBlockTiles>* works_;
  int slot_ = 0;
  uint32_t parity_ = 0;
};

/// A stage of the pipeline in shared memory, and what follows from its size. kRows: rows of x in a tile, 32, 96, 128 or 256; kStacks:
/// stacks of 64 weight rows of each consumer.
template <class F, int kRows, int kStacks, Offsets kOffsets>
struct Stage {
  /// k16 steps that are decoded at once. The compiler gives the operands of each size of wgmma registers of their own, so that many
  /// sizes leave room for one only.
  static constexpr int kSteps = kRows > 128 ? 1 : 2;
  static constexpr int kTiles = kConsumers * kStacks * 4;  // weight row tiles of the block
  using Queue = WorkQueue<kTiles>;
  static constexpr int kX = 0;
  static constexpr int kCodes = kX + kRows * kTileK * 2;
  static constexpr int kScales = kCodes + kTiles * TileBytes(F::kBits);
  static constexpr int kZeros = kScales + kTiles * kTileScaleBytes;
  static constexpr int kUsed = kZeros + (kOffsets != Offsets::kNone ? kTiles * kTileScaleBytes : 0);
  static constexpr int kBytes = (kUsed + 1023) / 1024 * 1024;  // operand B wants its alignment
  /// Rows of x that one tensor copy brings: as many as possible, or half of that. A copy costs the same whatever its size.
  static constexpr int kBoxRows = std::min(kRows, 128), kHalfBoxRows = kBoxRows / 2;
  /// Results of a consumer on their way out, [kStagedRows, 64 * kStacks] of 16 bits; + 16 bytes a row: no bank conflicts.
  static constexpr int kStagedRows = kRows < 64 / kStacks ? kRows : 64 / kStacks;
  static constexpr int kStagedStride = 64 * kStacks * 2 + 16;
  static constexpr int kStagedBytes = std::max(kStagedRows * kStagedStride, 4 * kStagedFloats * 4);
  // In front of the stages: barriers, queue of work items, staged results. And up to 1023 bytes to align.
  static constexpr int kQueue = 128, kStaged = kQueue + Queue::kBytes;
  static constexpr int kFront = (kStaged + kConsumers * kStagedBytes + 1023) / 1024 * 1024;
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

/// How x comes into a stage: by tensor copies, or value by value where it is not aligned for them.
enum class XSource { kTensor, kValues };

/// The matrices that tensor copies read. A row of codes, scales and zero offsets is a row tile of weights.
struct Tensors {
  CUtensorMap codes, scales, zeros;
  CUtensorMap x, x_half;  // for XSource::kTensor, in boxes of kBoxRows and kHalfBoxRows
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

/// Brings kTileK values from `first_k` on of each row of the tile to shared memory; zeros beyond k.
template <class T>
__device__ void LoadValues(const CudaGemmArgs& args, const RowTile& tile, int first_k,
                           uint32_t shared) {
  const int chunk = threadIdx.x % 8, k = first_k + chunk * 8;
  for (int row = threadIdx.x / 8; row < tile.row_count; row += kGroup / 8)
    StoreShared16(shared + row * (kTileK * 2) + ((chunk ^ (row & 7)) * 16),
                  LoadUnaligned(XRow<T>(args, tile.row_begin + row) + k, k < args.k));
}

/// The loading warpgroup. Its first thread brings weights, and x too, by tensor copies. kValues: all its threads bring x, a thread
/// having 8 values of every 16th row.
template <class F, class T, int kRows, int kStacks, Offsets kOffsets, XSource kSource>
__device__ void Produce(const CudaGemmArgs& args, const Tensors& tensors, uint32_t stages,
                        Barriers barriers,
                        typename Stage<F, kRows, kStacks, kOffsets>::Queue queue) {
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  constexpr int kRowBytes = kTileK * 2, kHalf = Layout::kHalfBoxRows;
  const bool first = threadIdx.x == 0;
  if (kSource == XSource::kTensor && !first) return;
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
  const bool scaled = args.block_scales != nullptr;
  const bool offset = kOffsets != Offsets::kNone && args.zero_offsets != nullptr;
  const uint32_t weight_bytes =
      Layout::kTiles *
      (TileBytes(F::kBits) + tensors.scale_bytes * ((scaled ? 1 : 0) + (offset ? 1 : 0)));
  RingIndex<Layout::kStages, Layout::kBytes> ring;

  const Items<Layout::kTiles> items(args);
  RowTile tile;
  for (int item = blockIdx.x, next; items.Rows(item, &tile); item = next) {
    const int first_row_tile = items.FirstRowTile(item);
    if (first) queue.Push(args, tile, first_row_tile);
    next = int(gridDim.x) + (kSource == XSource::kTensor && args.next_item != nullptr
                                 ? atomicAdd(args.next_item, 1)
                                 : item);
    const int weight_row = tile.expert * args.row_tiles + first_row_tile;
    const int loaded =
        kSource == XSource::kTensor ? (tile.row_count + kHalf - 1) / kHalf * kHalf : 0;
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const uint32_t full = barriers.Full(ring.stage), stage = stages + ring.offset;
      BarrierWait(barriers.Empty(ring.stage), ring.parity ^ 1);
      if (first) {
        BarrierArriveExpecting(full, weight_bytes + loaded * kRowBytes);
        TensorCopy(stage + Layout::kCodes, tensors.codes, k_tile * (TileBytes(F::kBits) / 8),
                   weight_row, full);
        const int column = ((k_tile * kTileK) >> args.block_shift) * kTileRows;
        if (scaled) TensorCopy(stage + Layout::kScales, tensors.scales, column, weight_row, full);
        if (offset) TensorCopy(stage + Layout::kZeros, tensors.zeros, column, weight_row, full);
        for (int row = 0; row < loaded; row += Layout::kBoxRows)
          TensorCopy(stage + Layout::kX + row * kRowBytes,
                     loaded - row > kHalf ? tensors.x : tensors.x_half, k_tile * kTileK,
                     tile.row_begin + row, full);
      }
      if constexpr (kSource == XSource::kValues) {
        LoadValues<T>(args, tile, k_tile * kTileK, stage + Layout::kX);
        FenceAsyncProxy();
        BarrierArrive(full);
      }
      ring.Next();
    }
  }
  if (first) queue.PushEnd();
}

}  // namespace qmoe_plugin::grouped_gemm_sm90
