// The end of a work item of grouped_gemm_sm90: row scales, biases and activation of a warpgroup's sums, and y.
//
// A lane has gate and up of the same feature (rows g and g + 8 of a row tile), so it activates what it holds. Results go through
// shared memory, so that neighbouring lanes store neighbouring columns: half a sector by itself would cost memory as much as a
// whole one. Those of 16 bits, transposed, by the warpgroup; float32, of which there are few, by each warp.
#pragma once

#include "ops/common/hopper.cuh"
#include "ops/common/tile.cuh"

namespace qmoe_plugin::grouped_gemm_sm90 {

inline constexpr int kPieceRows = 32;               // of x, that a warp finishes at once
inline constexpr int kFloatStride = kTileRows + 1;  // no bank conflicts
inline constexpr int kStagedFloats = kPieceRows * kFloatStride;  // a warp

/// A work item, and what its end needs: in shared memory, so that nothing there waits for global memory.
template <int kBlockTiles>
struct Work {
  RowTile rows;  // none: there are no more items
  int first_row_tile;
  float scales[kBlockTiles * kTileRows], biases[kBlockTiles * kTileRows];
};

/// Row scales and biases of a lane's tile rows g and g + 8.
struct RowConstants {
  float2 scale, bias;

  /// Of a row tile; `biases` may be null.
  __device__ void Load(const float* scales, const float* biases, int g) {
    scale = *reinterpret_cast<const float2*>(scales + 2 * g);
    bias = make_float2(0, 0);
    if (biases != nullptr) bias = *reinterpret_cast<const float2*>(biases + 2 * g);
  }
};

/// What a lane has of a row tile and kPieceRows rows of x: v[n] is of rows 8 n + 2 t and 8 n + 2 t + 1 of x, first tile row g, then g + 8.
struct Piece {
  float v[kPieceRows / 8][4];

  /// Scaled and biased sums of piece `piece`.
  template <int kSums>
  __device__ void Load(const float (&sums)[kSums], int piece, RowConstants row) {
    Renew(row.scale.x), Renew(row.scale.y);  // not all pieces at once
#pragma unroll
    for (int p = 0; p < 2 * kSums / kPieceRows; ++p) {  // registers have no run-time index
      if (p != piece) continue;
#pragma unroll
      for (int n = 0; n < kPieceRows / 8; ++n) {
        const float* c = sums + (p * (kPieceRows / 8) + n) * 4;
        v[n][0] = c[0] * row.scale.x + row.bias.x, v[n][1] = c[1] * row.scale.x + row.bias.x;
        v[n][2] = c[2] * row.scale.y + row.bias.y, v[n][3] = c[3] * row.scale.y + row.bias.y;
      }
    }
  }

  /// Gated: gates become the results.
  __device__ void Activate(const ActivationParams& activation) {
    if (activation.type == Activation::kIdentity) return;
    WithActivation(activation.type, [&]<Activation kType>() {
#pragma unroll
      for (int n = 0; n < kPieceRows / 8; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (c < 2 || !IsGated(kType))
            v[n][c] = ActivateAs<kType, true>(activation, v[n][c], v[n][(c + 2) % 4]);
    });
  }

  /// Rounded, half 0 (tile rows g) or 1 (g + 8): 16 bytes a row of x, at `shared` + row * stride.
  template <class T>
  __device__ void Stage(uint32_t shared, int stride, int half, int lane) const {
    uint32_t pairs[kPieceRows / 8];
#pragma unroll
    for (int n = 0; n < kPieceRows / 8; ++n)
      pairs[n] = PackPair<T>(v[n][2 * half], v[n][2 * half + 1]);
    StoreMatrix4Transposed(shared + lane * stride, pairs);
  }

  /// As float32, [kPieceRows, kTileRows] with a stride of kFloatStride.
  __device__ void StageFloats(float* shared, int lane) const {
#pragma unroll
    for (int n = 0; n < kPieceRows / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        shared[(8 * n + lane % 4 * 2 + c % 2) * kFloatStride + lane / 4 + c / 2 * 8] = v[n][c];
  }
};

/// Stores float32 rows of one row tile of weights, `columns` of them, from a warp's shared memory.
__device__ inline void StoreFloats(const CudaGemmArgs& args, int64_t row, int rows, int column,
                                   int columns, const float* staged, int lane) {
  columns = min(columns, (args.gated ? args.n / 2 : args.n) - column);
  float* y = static_cast<float*>(args.y) + row * args.y_stride + column;
#pragma unroll 1
  for (int i = lane; i < min(rows, kPieceRows) * kTileRows; i += 32)
    if (i % kTileRows < columns)
      y[i / kTileRows * args.y_stride + i % kTileRows] =
          staged[i / kTileRows * kFloatStride + i % kTileRows];
}

/// Which 16 bytes of a warpgroup's results a thread stores: the same columns of every step_-th row.
template <class T>
class Chunks {
 public:
  /// `per_row`: log2 of the chunks in a row. y of `first_row` and `first_column` is where the results begin.
  __device__ Chunks(const CudaGemmArgs& args, int64_t first_row, int first_column, int per_row,
                    int thread)
      : row_(thread >> per_row), step_(128 >> per_row), column_(thread & ((1 << per_row) - 1)) {
    const int column = first_column + column_ * 8;
    columns_ = (args.gated ? args.n / 2 : args.n) - column;
    y_ = static_cast<T*>(args.y) + (first_row + row_) * args.y_stride + column;
    y_step_ = step_ * args.y_stride;
    whole_ = columns_ >= 8 && (reinterpret_cast<uintptr_t>(y_) | args.y_stride * 2) % 16 == 0;
  }

  /// Stores kRows rows, of which there are `rows`.
  template <int kRows, int kMost>
  __device__ void Store(const char* staged, int stride, int rows) const {
    const char* from = staged + row_ * stride + column_ * 16;
    if (whole_) {
      uint4 values[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        values[i] =
            *reinterpret_cast<const uint4*>(from + (i * step_ < kRows ? i : 0) * step_ * stride);
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (row_ + i * step_ < min(rows, kRows))
          *reinterpret_cast<uint4*>(y_ + i * y_step_) = values[i];
    } else {
#pragma unroll 1
      for (int i = 0; row_ + i * step_ < min(rows, kRows); ++i)
#pragma unroll 1
        for (int c = 0; c < min(columns_, 8); ++c)
          y_[i * y_step_ + c] = reinterpret_cast<const T*>(from + i * step_ * stride)[c];
    }
  }

 private:
  int row_, step_, column_, columns_;
  bool whole_;
  T* y_;
  int64_t y_step_;
};

/// Writes y of a warpgroup's sums, which are `factor` times too small: stacks of 64 weight rows from the row tile `first_tile` of the
/// work item on. `staged` is the warpgroup's own shared memory, `barrier` its barrier.
template <class T, class Layout, int kStacks, int kSums>
__device__ void StoreSums(const CudaGemmArgs& args, const Work<Layout::kTiles>& work,
                          int first_tile, float factor, const float (&sums)[kStacks][kSums],
                          char* staged, int barrier) {
  constexpr int kPieces = Layout::kStagedRows / kPieceRows;
  constexpr int kMost = Layout::kStagedRows * 8 * kStacks / 128;  // chunks of a thread at once
  const RowTile tile = work.rows;
  const int halves = args.gated ? 1 : 2;  // of 8 columns that a row tile has
  const int first_column = (work.first_row_tile + first_tile) * halves * 8;
  const int per_row = kStacks * halves == 1 ? 2 : kStacks * halves == 2 ? 3 : 4;
#pragma unroll 1
  for (int done = 0; done < tile.row_count; done += Layout::kStagedRows) {
    int thread = threadIdx.x % 128;
    Renew(thread);  // what follows from it is computed anew: the sums leave no registers for that
    const int warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int s = 0; s < kStacks; ++s) {
      const int tile_of_group = warp * kStacks + s, column = tile_of_group * halves * 8;
      RowConstants constants;
      const int slot = (first_tile + tile_of_group) * kTileRows;
      constants.Load(work.scales + slot, args.bias != nullptr ? work.biases + slot : nullptr,
                     lane / 4);
      constants.scale.x *= factor, constants.scale.y *= factor;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int row = done + p * kPieceRows;
        Piece piece;
        piece.Load(sums[s], row / kPieceRows, constants);
        piece.Activate(args.activation);
        if (args.y_is_float) {
          float* floats = reinterpret_cast<float*>(staged) + warp * kStagedFloats;
          piece.StageFloats(floats, lane);
          __syncwarp();
          StoreFloats(args, tile.row_begin + int64_t(row), tile.row_count - row,
                      first_column + column, halves * 8, floats, lane);
          __syncwarp();
        } else {
          const uint32_t to =
              SharedAddress(staged) + p * (kPieceRows * Layout::kStagedStride) + column * 2;
          piece.Stage<T>(to, Layout::kStagedStride, 0, lane);
          if (halves == 2) piece.Stage<T>(to + 16, Layout::kStagedStride, 1, lane);
        }
      }
    }
    if (args.y_is_float) continue;
    SyncPart<128>(barrier);
    const Chunks<T> chunks(args, tile.row_begin + int64_t(done), first_column, per_row, thread);
    chunks.template Store<Layout::kStagedRows, kMost>(staged, Layout::kStagedStride,
                                                      tile.row_count - done);
    SyncPart<128>(barrier);
  }
}

}  // namespace qmoe_plugin::grouped_gemm_sm90
