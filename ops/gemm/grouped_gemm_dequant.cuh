// grouped_gemm_dequant: decodes weights to float32 in shared memory and multiplies there with plain
// FMAs. True float32: no TF32, no 16-bit products.
//
//   block     256 threads = 64 weight rows (4 row tiles) x 64 rows of x; each thread 4 x 4 sums
//   k         tiles of 64 in shared memory as float32, k outermost: weights [64 k, 64 rows] and
//             x [64 k, 64 rows]
//
// The fallback: every format, activation type and number of rows. It is what float32 runs above
// gemv_simt's few rows.
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tile.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::grouped_gemm_dequant {

inline constexpr int kThreads = 256;
inline constexpr int kBlockTiles = 4;  // weight row tiles of a block
inline constexpr int kRows = 64;       // rows of x of a block
// 68 = 4 (mod 64): the writes of a fragment (8 rows at 4 pairs of k) fall into different banks, and
// rows stay 16-byte aligned.
inline constexpr int kStride = 68;
static_assert(kBlockTiles * kTileRows == 64 && kRows == 64);

using Tile = float[kTileK][kStride];

/// Decodes one k tile. Warp w takes row tile w % 4, k16 steps 2 (w / 4) and the next.
template <class F, class T>
__device__ void LoadWeights(const CudaGemmArgs& args, const Codebook<F>& codebook,
                            const RowTile& tile, int first_row_tile, int k_tile, Tile& weights) {
  using S = ScaleOf<T>;
  using S2 = Scale2Of<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int local_tile = warp % kBlockTiles;
  const int row_tile =
      min(first_row_tile + local_tile, args.row_tiles - 1);  // repeats are not stored
  LaneCodes<F> codes;
  codes.LoadGlobal(TileCodes(args, tile.expert, row_tile) + int64_t(k_tile) * TileBytes(F::kBits),
                   lane);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    // A constant index for each half: LaneCodes must stay in registers.
    float2 w[4];
    if (warp < 4)
      codes.Dequant(codebook, step, w);
    else
      codes.Dequant(codebook, 2 + step, w);
    const int j = warp / 4 * 2 + step;
    const int64_t slot = TileScales(args, tile.expert, row_tile) + lane / 4 * 2 +
                         int64_t((k_tile * kTileK + 16 * j) >> args.block_shift) * kTileRows;
    float2 scale = make_float2(1.0f, 1.0f), offset = make_float2(0.0f, 0.0f);
    if (args.block_scales != nullptr)
      scale =
          ToFloat2(*reinterpret_cast<const S2*>(static_cast<const S*>(args.block_scales) + slot));
    if (args.zero_offsets != nullptr)
      offset =
          ToFloat2(*reinterpret_cast<const S2*>(static_cast<const S*>(args.zero_offsets) + slot));
    float* column = &weights[16 * j + lane % 4 * 2][local_tile * kTileRows + lane / 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // pairs 0 and 2 are row g, 1 and 3 row g + 8; 2 and 3 at k + 8
      const float o = i % 2 ? offset.y : offset.x, s = i % 2 ? scale.y : scale.x;
      float* target = column + i % 2 * 8 + i / 2 * 8 * kStride;
      target[0] = (w[i].x + o) * s;
      target[kStride] = (w[i].y + o) * s;
    }
  }
}

/// One k tile of x, zero beyond K and beyond the tile's rows. A warp reads 8 k of 4 rows at a time.
template <class T>
__device__ void LoadX(const CudaGemmArgs& args, const RowTile& tile, int k_tile, Tile& x) {
  const int first_row = threadIdx.x / 8, first_k = threadIdx.x % 8;
#pragma unroll
  for (int r = first_row; r < kRows; r += kThreads / 8) {
    const T* source = r < tile.row_count ? XRow<T>(args, tile.row_begin + r) : nullptr;
#pragma unroll
    for (int i = 0; i < kTileK; i += 8) {
      const int64_t k = int64_t(k_tile) * kTileK + i + first_k;
      x[i + first_k][r] = source != nullptr && k < args.k ? ToFloat(source[k]) : 0.0f;
    }
  }
}

template <class F, class T>
__global__ void __launch_bounds__(kThreads, 3)
    grouped_gemm_dequant(const __grid_constant__ CudaGemmArgs args) {
  __shared__ __align__(16) float shared[2][kTileK][kStride];  // weights, x; the sums at the end
  const unsigned weight_blocks = (args.row_tiles + kBlockTiles - 1) / kBlockTiles;
  const int first_row_tile = blockIdx.x % weight_blocks * kBlockTiles;
  RowTile tile;
  if (!GetRowTile(args, blockIdx.x / weight_blocks, &tile)) return;
  const int row = threadIdx.x % 16 * 4, weight_row = threadIdx.x / 16 * 4;

  const Codebook<F> codebook(args);
  float sums[4][4] = {};  // [row of x][weight row]
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    LoadWeights<F, T>(args, codebook, tile, first_row_tile, k_tile, shared[0]);
    LoadX<T>(args, tile, k_tile, shared[1]);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kTileK; ++k) {
      const float4 w = *reinterpret_cast<const float4*>(&shared[0][k][weight_row]);
      const float4 x = *reinterpret_cast<const float4*>(&shared[1][k][row]);
      const float xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sums[r][0] += xs[r] * w.x;
        sums[r][1] += xs[r] * w.y;
        sums[r][2] += xs[r] * w.z;
        sums[r][3] += xs[r] * w.w;
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 4; ++r)
    *reinterpret_cast<float4*>(&shared[0][row + r][weight_row]) =
        make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  __syncthreads();
  StoreRowTile<T, kThreads, kBlockTiles>(args, tile, first_row_tile, &shared[0][0][0], kStride);
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = kFirstSm, kMaxSm = kLastSm;
  static constexpr int kPriority = 10;
  static constexpr char kLimits[] = "none";
  static std::vector<DType> DTypes() {
    return {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  }

  static std::string Refuse(const GemmProblem& p) { return RefuseBlockSize(p); }
  static int TileRows(const GemmProblem&) { return kRows; }

  static void Prepare(DType dtype, int) {
    WithType(dtype, [](auto type) {
      PrepareKernel("grouped_gemm_dequant",
                    reinterpret_cast<const void*>(&grouped_gemm_dequant<F, decltype(type)>));
    });
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    const int64_t weight_blocks = (args.row_tiles + kBlockTiles - 1) / kBlockTiles;
    WithType(args.dtype, [&](auto type) {
      using T = decltype(type);
      ::qmoe_plugin::Launch("grouped_gemm_dequant", &grouped_gemm_dequant<F, T>,
                            args.max_tiles * weight_blocks, kThreads, 0, stream, args);
    });
  }
};

}  // namespace qmoe_plugin::grouped_gemm_dequant
