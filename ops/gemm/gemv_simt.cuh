// gemv_simt: few rows, any float activation type, float32 FMAs.
//
//   block     256 threads = one weight row tile (16 rows) x kRows rows of x (1, 2, 4 or 8)
//   k         the 8 warps take 64-k tiles in turn, each kUnroll of them at once so that loads
//             overlap; their sums meet in shared memory and are added in the order of the warps
//   weights   16-byte streaming loads to registers, decoded to float32; read once a block
//   x         [kRows, 64] of each k tile, through the warp's own shared memory as float32, zero
//             beyond K
//   scales    one pair a lane and quantization block, applied to the sums of 16 k
//
// Chosen when an expert has so few rows that reading its weights is all the work. Refuses more
// rows: kernels that use decoded weights for many rows are faster from there on.
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tile.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::gemv_simt {

inline constexpr int kWarps = 8;

/// One k tile of a lane: everything that comes from global memory.
template <class F, class T>
struct WeightTile {
  LaneCodes<F> codes;
  Scale2Of<T> scales[kFragmentsPerTile], offsets[kFragmentsPerTile];

  /// `codes_base` is the row tile's, scales and offsets the lane's pair of its first block.
  __device__ void Load(const CudaGemmArgs& args, const uint8_t* codes_base, const ScaleOf<T>* scale,
                       const ScaleOf<T>* offset, int k_tile, int lane) {
    codes.LoadGlobal(codes_base + int64_t(k_tile) * TileBytes(F::kBits), lane);
#pragma unroll
    for (int j = 0; j < kFragmentsPerTile; ++j) {
      const int64_t block = (k_tile * kTileK + 16 * j) >> args.block_shift;
      // Blocks have 16, 32 or more codes: fragment 2 needs a load unless blocks have 64, 1 and 3
      // only if 16.
      if (j == 0 || args.block_shift < (j == 2 ? 6 : 5)) {
        if (scale != nullptr) scales[j] = LoadPair(scale + block * kTileRows);
        if (offset != nullptr) offsets[j] = LoadPair(offset + block * kTileRows);
      } else {
        scales[j] = scales[j - 1];
        offsets[j] = offsets[j - 1];
      }
    }
  }

 private:
  __device__ static Scale2Of<T> LoadPair(const ScaleOf<T>* p) {
    return *reinterpret_cast<const Scale2Of<T>*>(p);
  }
};

/// Adds one k tile to the lane's sums of rows g and g + 8. `x` is [kRows, 64].
template <class F, class T, int kRows>
__device__ void Accumulate(const WeightTile<F, T>& tile, const Codebook<F>& codebook, bool scaled,
                           bool with_offsets, const float* x, int lane, float (&sums)[kRows][2]) {
#pragma unroll
  for (int j = 0; j < kFragmentsPerTile; ++j) {
    float2 w[4];
    tile.codes.Dequant(codebook, j, w);
    if (with_offsets) {
      const float2 offset = ToFloat2(tile.offsets[j]);
      w[0].x += offset.x, w[0].y += offset.x, w[2].x += offset.x, w[2].y += offset.x;
      w[1].x += offset.y, w[1].y += offset.y, w[3].x += offset.y, w[3].y += offset.y;
    }
    const float2 scale = scaled ? ToFloat2(tile.scales[j]) : make_float2(1.0f, 1.0f);
    const float* x_low = x + 16 * j + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float2 low = *reinterpret_cast<const float2*>(x_low + r * kTileK);
      const float2 high = *reinterpret_cast<const float2*>(x_low + r * kTileK + 8);
      const float upper = w[0].x * low.x + w[0].y * low.y + w[2].x * high.x + w[2].y * high.y;
      const float lower = w[1].x * low.x + w[1].y * low.y + w[3].x * high.x + w[3].y * high.y;
      sums[r][0] += upper * scale.x;
      sums[r][1] += lower * scale.y;
    }
  }
}

/// The sums of one warp, over its k tiles.
template <class F, class T, int kRows, int kUnroll>
__device__ void SumTiles(const CudaGemmArgs& args, const RowTile& rows, int row_tile, int warp,
                         int lane, float (*x_shared)[kRows][kTileK], float (&sums)[kRows][2]) {
  using S = ScaleOf<T>;
  const Codebook<F> codebook(args);
  const uint8_t* codes = TileCodes(args, rows.expert, row_tile);
  const int64_t slot = TileScales(args, rows.expert, row_tile) + lane / 4 * 2;
  const S *scales = nullptr, *offsets = nullptr;
  if (args.block_scales != nullptr) scales = static_cast<const S*>(args.block_scales) + slot;
  if (args.zero_offsets != nullptr) offsets = static_cast<const S*>(args.zero_offsets) + slot;
  const T* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)  // rows that are not there repeat the last one and are not stored
    x[r] = XRow<T>(args, rows.row_begin + min(r, rows.row_count - 1));

  const int k_tiles = (args.k + kTileK - 1) / kTileK;
  for (int first = warp; first < k_tiles; first += kWarps * kUnroll) {
    WeightTile<F, T> tiles[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (const int k_tile = first + u * kWarps; k_tile < k_tiles)
        tiles[u].Load(args, codes, scales, offsets, k_tile, lane);
    __syncwarp();  // the last round's x has been read
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = half * 32 + lane;
        const int64_t k = int64_t(first + u * kWarps) * kTileK + column;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          x_shared[u][r][column] = k < args.k ? ToFloat(x[r][k]) : 0.0f;
      }
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * kWarps < k_tiles)
        Accumulate<F, T, kRows>(tiles[u], codebook, scales != nullptr, offsets != nullptr,
                                &x_shared[u][0][0], lane, sums);
  }
}

template <class F, class T, int kRows>
__global__ void __launch_bounds__(kWarps * 32)
    gemv_simt(const __grid_constant__ CudaGemmArgs args) {
  constexpr int kUnroll = kRows <= 4 ? 2 : 1;
  __shared__ __align__(16) float x_shared[kWarps][kUnroll][kRows][kTileK];
  __shared__ float partial[kWarps][kRows][kTileRows];
  __shared__ float total[kRows][kTileRows];

  const int row_tile = blockIdx.x % unsigned(args.row_tiles);
  RowTile rows;
  if (!GetRowTile(args, blockIdx.x / unsigned(args.row_tiles), &rows)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float sums[kRows][2] = {};
  SumTiles<F, T, kRows, kUnroll>(args, rows, row_tile, warp, lane, x_shared[warp], sums);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[r][i] += __shfl_xor_sync(0xffffffff, sums[r][i], 1);
      sums[r][i] += __shfl_xor_sync(0xffffffff, sums[r][i], 2);
      if (lane % 4 == 0) partial[warp][r][lane / 4 + 8 * i] = sums[r][i];
    }
  }
  __syncthreads();
  if (threadIdx.x < kRows * kTileRows) {
    const int r = threadIdx.x / kTileRows, i = threadIdx.x % kTileRows;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][r][i];
    total[r][i] = sum;
  }
  __syncthreads();
  StoreRowTile<T, kWarps * 32, 1>(args, rows, row_tile, &total[0][0], kTileRows);
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = kFirstSm, kMaxSm = kLastSm;
  static constexpr int kPriority = 30;
  static constexpr char kLimits[] =
      "few rows: at most 16 in all and 4 an expert, float32 8 an expert";
  static std::vector<DType> DTypes() {
    return {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  }

  static std::string Refuse(const GemmProblem& p) {
    const int64_t per_expert = (p.rows + p.experts - 1) / p.experts;
    // There is no tensor core kernel for float32, so it pays longer.
    const int64_t most = p.dtype == DType::kFloat32 ? 8 : 4;
    if (per_expert > most)
      return Concat(per_expert, " rows an expert on average; it takes at most ", most);
    if (p.dtype != DType::kFloat32 && p.rows > 16)
      return Concat(p.rows, " rows in all; it takes at most 16");
    return RefuseBlockSize(p);
  }

  static int TileRows(const GemmProblem& p) {
    int rows = 1;
    while (rows < 8 && rows * p.experts < p.rows) rows *= 2;
    return rows;
  }

  static void Prepare(DType dtype, int) {
    WithType(dtype, [](auto type) {
      using T = decltype(type);
      for (auto* kernel :
           {&gemv_simt<F, T, 1>, &gemv_simt<F, T, 2>, &gemv_simt<F, T, 4>, &gemv_simt<F, T, 8>})
        PrepareKernel("gemv_simt", reinterpret_cast<const void*>(kernel));
    });
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    WithType(args.dtype, [&](auto type) {
      using T = decltype(type);
      auto* kernel = args.tile_rows == 1   ? &gemv_simt<F, T, 1>
                     : args.tile_rows == 2 ? &gemv_simt<F, T, 2>
                     : args.tile_rows == 4 ? &gemv_simt<F, T, 4>
                                           : &gemv_simt<F, T, 8>;
      ::qmoe_plugin::Launch("gemv_simt", kernel, args.max_tiles * args.row_tiles, kWarps * 32, 0,
                            stream, args);
    });
  }
};

}  // namespace qmoe_plugin::gemv_simt
