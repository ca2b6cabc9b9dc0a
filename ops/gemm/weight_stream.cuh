// A warp's k tiles on their way from global to shared memory: a ring of stages that cp.async fills ahead of use. No other warp
// takes part, so nothing but the warp itself has to wait.
#pragma once

#include "ops/common/ptx.cuh"
#include "ops/common/tile.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin {

/// How block scales lie along k: one every 16, every 32, or every 64 or more (and per channel).
enum class ScaleBlocks { k16, k32, kWide };

/// Some k tiles of one unit in shared memory: codes, 1 KB for most formats, then scales and zero offsets, [tile, block, 16].
template <class F, ScaleBlocks kBlocks, bool kOffsets>
struct WeightStage {
  static constexpr int kTiles = F::kBits < 8 ? 2 : 1;
  static constexpr int kCodeBytes = kTiles * TileBytes(F::kBits);
  static constexpr int kPairs = kBlocks == ScaleBlocks::k16   ? 4
                                : kBlocks == ScaleBlocks::k32 ? 2
                                                              : 1;
  static constexpr int kTileScaleBytes = kPairs * kTileRows * 2;
  static constexpr int kScaleBytes = kTiles * kTileScaleBytes;
  static constexpr int kScales = kCodeBytes, kOffsetsAt = kScales + kScaleBytes;
  static constexpr int kBytes = kOffsetsAt + (kOffsets ? kScaleBytes : 0);
  /// Stages of a warp; one of them is being read.
  static constexpr int kDepth = F::kBits == 2 ? 8 : 4;
  static constexpr int kRing = kDepth * kBytes;
};

/// Brings a warp's k tiles, one stage after the other, into its ring.
template <class F, ScaleBlocks kBlocks, bool kOffsets>
class WeightStream {
  using Stage = WeightStage<F, kBlocks, kOffsets>;
  static constexpr int kTileChunks = Stage::kTileScaleBytes / 16;  // of scales; a lane each
  static constexpr int kScaleChunks = Stage::kScaleBytes / 16;
  static_assert(kScaleChunks * (kOffsets ? 2 : 1) <= 32);
  static constexpr int kStride = TileBytes(F::kBits);

 public:
  /// `left` k tiles from tile `k_tile` of row tile `row_tile` of the first slot of `slots` on.
  __device__ WeightStream(const CudaGemmArgs& args, uint32_t ring, const RowTile* slots,
                          int row_tile, int k_tile, int left, int lane)
      : to_(ring + lane * 16),
        end_(to_ + Stage::kRing),
        lane_(lane),
        slot_(slots),
        row_tile_(row_tile),
        left_(left) {
    // Lanes beyond the chunks of scales copy zero offsets.
    copies_scales_ = Scales(args) != nullptr && lane < kScaleChunks * (kOffsets ? 2 : 1);
    if (left > 0) Begin(args, k_tile);
  }

  /// Copies the next stage, if there is one, and commits.
  __device__ void Load(const CudaGemmArgs& args) {
    if (whole_ > 0) {
      --whole_;
#pragma unroll
      for (int at = 0; at < Stage::kCodeBytes; at += 512) CopyAsyncStream16(to_ + at, codes_ + at);
      if (copies_scales_) CopyAsync<16>(to_ + Stage::kScales, ScalesOf(args));
      Advance(Stage::kTiles);
    } else {
      LoadRest(args);
    }
    CopyAsyncCommit();  // an empty group at the end, so that groups and stages stay in step
  }

 private:
  /// From k tile `k_tile` of the present row tile on.
  __device__ void Begin(const CudaGemmArgs& args, int k_tile) {
    const int count = min((args.k + kTileK - 1) / kTileK - k_tile, left_);
    whole_ = count / Stage::kTiles;
    rest_ = count % Stage::kTiles;
    left_ -= count;
    codes_ = TileCodes(args, slot_->expert, row_tile_) + lane_ * 16 + int64_t(k_tile) * kStride;
    tile_ = k_tile + lane_ % kScaleChunks / kTileChunks;
    row_scales_ =
        Scales(args) + TileScales(args, slot_->expert, row_tile_) + lane_ % kTileChunks * 8;
    if constexpr (kBlocks != ScaleBlocks::kWide) row_scales_ += tile_ * (Stage::kPairs * kTileRows);
  }

  /// The rest of a row tile that does not fill a stage; or the next row tile's first stage.
  __device__ void LoadRest(const CudaGemmArgs& args) {
    if (rest_ == 0) {
      if (left_ == 0) return;
      if (++row_tile_ == args.row_tiles) row_tile_ = 0, ++slot_;
      Begin(args, 0);
    }
    const int count = whole_ > 0 ? Stage::kTiles : rest_;
    whole_ > 0 ? --whole_ : rest_ = 0;
#pragma unroll
    for (int at = 0; at < Stage::kCodeBytes; at += 512)
      if (at + lane_ * 16 < count * kStride) CopyAsyncStream16(to_ + at, codes_ + at);
    if (copies_scales_ && lane_ % kScaleChunks / kTileChunks < count)
      CopyAsync<16>(to_ + Stage::kScales, ScalesOf(args));
    Advance(count);
  }

  __device__ const __half* Scales(const CudaGemmArgs& args) const {
    return static_cast<const __half*>(lane_ < kScaleChunks ? args.block_scales : args.zero_offsets);
  }

  __device__ const __half* ScalesOf(const CudaGemmArgs& args) const {
    if constexpr (kBlocks != ScaleBlocks::kWide) return row_scales_;
    return row_scales_ + ((tile_ * kTileK) >> args.block_shift) * kTileRows;
  }

  __device__ void Advance(int count) {
    codes_ += count * kStride;
    if constexpr (kBlocks == ScaleBlocks::kWide)
      tile_ += count;
    else
      row_scales_ += count * (Stage::kPairs * kTileRows);
    to_ += Stage::kBytes;
    if (to_ == end_) to_ -= Stage::kRing;
  }

  uint32_t to_, end_;  // where this lane's chunk of the next stage goes; the ring's end
  int lane_;
  const RowTile* slot_;
  int row_tile_;
  int whole_ = 0, rest_ = 0, left_;  // whole stages, then tiles, of this row tile; then tiles
  int tile_;                         // k tile whose scales this lane copies next
  bool copies_scales_;
  const uint8_t* codes_;
  const __half* row_scales_;
};

}  // namespace qmoe_plugin
