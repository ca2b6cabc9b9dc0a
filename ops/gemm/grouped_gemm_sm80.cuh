// grouped_gemm_sm80: float16 and bfloat16 on tensor cores, mma.sync.m16n8k16 with float32 sums.
//
//   block     128 threads = 128 weight rows (8 row tiles) x kRows rows of x (16, 32 or 64)
//   warp      2 weight row tiles as operand A, all kRows rows of x as operand B: no weight is
//             decoded twice
//   pipeline  kStages stages of 64 k in shared memory, filled by cp.async: x [kRows, 64] swizzled,
//             codes [8 tiles], scales and zero offsets [8 tiles, up to 4 blocks, 16]
//   decode    exactly to centered values, + zero offset, * block scale, rounded once to the
//             activation type
//   epilogue  sums meet in shared memory as float32 [kRows, 128]; row scale, bias, activation;
//             coalesced stores
//
// x beyond K and beyond the tile's rows is zero. Rows of x that are not 16-byte aligned are copied
// element by element. Chosen above gemv_simt's few rows. Not for float32: grouped_gemm_dequant runs
// that exactly.
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tile.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::grouped_gemm_sm80 {

inline constexpr int kWarps = 4, kThreads = kWarps * 32;
inline constexpr int kWarpTiles = 2;                     // weight row tiles of a warp
inline constexpr int kBlockTiles = kWarps * kWarpTiles;  // of a block
inline constexpr int kMaxBlocks = kTileK / 16;           // quantization blocks in a k tile, at most
inline constexpr int kSumStride = kBlockTiles * kTileRows + 4;  // + 4: no bank conflicts

/// Shared memory of one stage, in bytes.
template <class F, int kRows>
struct Stage {
  static constexpr int kScaleBytes = kMaxBlocks * kTileRows * 2;  // of a row tile
  static constexpr int kX = 0;
  static constexpr int kCodes = kX + kRows * kTileK * 2;
  static constexpr int kScales = kCodes + kBlockTiles * TileBytes(F::kBits);
  static constexpr int kOffsets = kScales + kBlockTiles * kScaleBytes;
  static constexpr int kBytes = kOffsets + kBlockTiles * kScaleBytes;
};

template <int kRows>
inline constexpr int kStages = kRows >= 64 ? 3 : 4;

template <class F, int kRows>
constexpr int SharedBytes() {
  const int pipeline = kStages<kRows> * Stage<F, kRows>::kBytes;
  const int sums = kRows * kSumStride * int(sizeof(float));
  return pipeline > sums ? pipeline : sums;
}

/// Byte of chunk `chunk` (8 values of k) of row `row` in a swizzled [kRows, 64] tile of x: the 8
/// rows that an ldmatrix reads fall into different banks.
__device__ inline int SwizzledX(int row, int chunk) {
  return row * (kTileK * 2) + ((chunk ^ (row & 7)) * 16);
}

/// Fills x of a stage. Each thread has one chunk of every 16th row.
template <class T, int kRows>
struct XLoader {
  static constexpr int kPerThread = kRows / 16;
  const T* source[kPerThread];  // null = row is not there
  int row, chunk;
  bool aligned;

  __device__ XLoader(const CudaGemmArgs& args, const RowTile& tile)
      : row(threadIdx.x / 8), chunk(threadIdx.x % 8) {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(args.x) | (args.x_stride * sizeof(T));
    aligned = bits % 16 == 0 && args.k % 8 == 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int r = row + 16 * i;
      source[i] = r < tile.row_count ? XRow<T>(args, tile.row_begin + r) : nullptr;
    }
  }

  __device__ void Load(const CudaGemmArgs& args, int k_tile, char* x) const {
    const int k = k_tile * kTileK + chunk * 8;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      char* target = x + SwizzledX(row + 16 * i, chunk);
      const bool valid = source[i] != nullptr && k < args.k;
      if (aligned) {
        CopyAsync16(target, valid ? source[i] + k : args.x, valid);
      } else {
        T* values = reinterpret_cast<T*>(target);
        for (int e = 0; e < 8; ++e)
          values[e] = valid && k + e < args.k ? source[i][k + e] : FromFloat<T>(0.0f);
      }
    }
  }
};

/// Fills codes, scales and zero offsets of a stage; each warp for its own row tiles.
template <class F, int kRows>
struct WeightLoader {
  using Layout = Stage<F, kRows>;
  const uint8_t* codes[kWarpTiles];
  int64_t slots;       // this lane's chunk of scales and zero offsets, k tile 0
  bool copies_scales;  // not all lanes do
  int warp, lane;

  __device__ WeightLoader(const CudaGemmArgs& args, const RowTile& tile, int first_row_tile)
      : warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    // Row tiles beyond the last repeat it; what they give is not stored.
    const auto row_tile = [&](int i) {
      return min(first_row_tile + warp * kWarpTiles + i, args.row_tiles - 1);
    };
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) codes[i] = TileCodes(args, tile.expert, row_tile(i));
    // 8 lanes a row tile, a chunk of 8 slots each: two chunks a block.
    const int blocks = args.block_shift >= 6 ? 1 : kTileK >> args.block_shift;
    copies_scales = lane < 8 * kWarpTiles && lane % 8 < 2 * blocks;
    slots = TileScales(args, tile.expert, row_tile(lane / 8 % kWarpTiles)) + lane % 8 * 8;
  }

  __device__ void Load(const CudaGemmArgs& args, int k_tile, char* stage) const {
    constexpr int kTileBytes = TileBytes(F::kBits);
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      char* target = stage + Layout::kCodes + (warp * kWarpTiles + i) * kTileBytes;
      const uint8_t* source = codes[i] + int64_t(k_tile) * kTileBytes;
#pragma unroll
      for (int byte = 0; byte < kTileBytes; byte += 512)
        if (const int at = byte + lane * 16; at < kTileBytes)
          CopyAsync16(target + at, source + at, true);
    }
    if (!copies_scales) return;
    const int64_t from = slots + int64_t((k_tile * kTileK) >> args.block_shift) * kTileRows;
    const int at = (warp * kWarpTiles + lane / 8) * Layout::kScaleBytes + lane % 8 * 16;
    if (args.block_scales != nullptr)
      CopyAsync16(stage + Layout::kScales + at,
                  static_cast<const __half*>(args.block_scales) + from, true);
    if (args.zero_offsets != nullptr)
      CopyAsync16(stage + Layout::kOffsets + at,
                  static_cast<const __half*>(args.zero_offsets) + from, true);
  }
};

/// Operand A of one k16 step of one row tile: decoded, offset and scaled.
template <class F, class T, bool kOffsets>
__device__ void DecodeOperand(const LaneCodes<F>& codes, const Codebook<F>& codebook, int j,
                              __half2 scale, __half2 offset, uint32_t (&a)[4]) {
  if constexpr (std::is_same_v<T, __half> && !kOffsets && !F::kCodebook) {
    __half2 w[4];
    codes.Dequant(codebook, j, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are row g, 1 and 3 row g + 8
      w[i] = __hmul2(w[i], i % 2 ? __high2half2(scale) : __low2half2(scale));
      a[i] = reinterpret_cast<const uint32_t&>(w[i]);
    }
  } else {
    // In float32, so that the weight is rounded once: a float16 scale times an integer does not fit
    // bfloat16, a fractional zero point need not fit float16 beside its code, and values of a
    // codebook fit neither type.
    float2 w[4];
    codes.Dequant(codebook, j, w);
    const float2 s = ToFloat2(scale), o = ToFloat2(offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float row_scale = i % 2 ? s.y : s.x, row_offset = i % 2 ? o.y : o.x;
      a[i] = PackPair<T>((w[i].x + row_offset) * row_scale, (w[i].y + row_offset) * row_scale);
    }
  }
}

/// Multiplies one stage.
template <class F, class T, int kRows, bool kOffsets>
__device__ void MultiplyStage(const CudaGemmArgs& args, const Codebook<F>& codebook,
                              const char* stage, int warp, int lane,
                              float (&sums)[kWarpTiles][kRows / 8][4]) {
  using Layout = Stage<F, kRows>;
  LaneCodes<F> codes[kWarpTiles];
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i)
    codes[i].LoadShared(stage + Layout::kCodes + (warp * kWarpTiles + i) * TileBytes(F::kBits),
                        lane);

#pragma unroll
  for (int pair = 0; pair < kFragmentsPerTile / 2;
       ++pair) {  // two k16 steps: one ldmatrix of x each 8 rows
    uint32_t a[2][kWarpTiles][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int j = pair * 2 + step;
      const int block = (16 * j) >> min(args.block_shift, 6);
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const int at =
            (warp * kWarpTiles + i) * Layout::kScaleBytes + (block * kTileRows + lane / 4 * 2) * 2;
        __half2 scale = __float2half2_rn(1.0f), offset = __float2half2_rn(0.0f);
        if (args.block_scales != nullptr)
          scale = *reinterpret_cast<const __half2*>(stage + Layout::kScales + at);
        if constexpr (kOffsets)
          offset = *reinterpret_cast<const __half2*>(stage + Layout::kOffsets + at);
        DecodeOperand<F, T, kOffsets>(codes[i], codebook, j, scale, offset, a[step][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      uint32_t b[4];  // k chunks 4 pair to 4 pair + 3 of 8 rows of x
      LoadMatrix4(b, stage + Layout::kX + SwizzledX(n * 8 + lane % 8, pair * 4 + lane / 8));
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i)
          Mma<T>(sums[i][n], a[step][i], b[2 * step], b[2 * step + 1]);
    }
  }
}

template <class F, class T, int kRows, bool kOffsets>
__global__ void __launch_bounds__(kThreads, kRows >= 64 ? 3 : 4)
    grouped_gemm_sm80(const __grid_constant__ CudaGemmArgs args) {
  constexpr int kDepth = kStages<kRows>, kStageBytes = Stage<F, kRows>::kBytes;
  const unsigned weight_blocks = (args.row_tiles + kBlockTiles - 1) / kBlockTiles;
  const int first_row_tile = blockIdx.x % weight_blocks * kBlockTiles;
  RowTile tile;
  if (!GetRowTile(args, blockIdx.x / weight_blocks, &tile)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* shared = DynamicShared();

  const XLoader<T, kRows> x_loader(args, tile);
  const WeightLoader<F, kRows> weight_loader(args, tile, first_row_tile);
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
  const auto load = [&](int k_tile) {
    if (k_tile < k_tiles) {
      char* stage = shared + k_tile % kDepth * kStageBytes;
      x_loader.Load(args, k_tile, stage + Stage<F, kRows>::kX);
      weight_loader.Load(args, k_tile, stage);
    }
    CopyAsyncCommit();  // an empty group at the end, so that groups and k tiles stay in step
  };

  const Codebook<F> codebook(args);
  float sums[kWarpTiles][kRows / 8][4] = {};
#pragma unroll
  for (int k_tile = 0; k_tile < kDepth - 1; ++k_tile) load(k_tile);
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    CopyAsyncWait<kDepth - 2>();
    __syncthreads();  // k_tile has arrived for all; the stage of k_tile - 1 is free
    load(k_tile + kDepth - 1);
    MultiplyStage<F, T, kRows, kOffsets>(args, codebook, shared + k_tile % kDepth * kStageBytes,
                                         warp, lane, sums);
  }
  CopyAsyncWait<0>();
  __syncthreads();

  float* staged = reinterpret_cast<float*>(shared);  // [kRows, kSumStride]
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = n * 8 + lane % 4 * 2 + c % 2;
        const int tile_row = lane / 4 + c / 2 * 8;
        staged[row * kSumStride + (warp * kWarpTiles + i) * kTileRows + tile_row] = sums[i][n][c];
      }
  __syncthreads();
  StoreRowTile<T, kThreads, kBlockTiles>(args, tile, first_row_tile, staged, kSumStride);
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = kFirstSm, kMaxSm = kLastSm;
  static constexpr int kPriority = 20;
  static constexpr char kLimits[] = "any number of rows";
  static std::vector<DType> DTypes() { return {DType::kFloat16, DType::kBFloat16}; }

  static std::string Refuse(const GemmProblem& p) { return RefuseBlockSize(p); }

  /// Rows an expert gets on average if routing is even; tiles are larger, so that most experts need
  /// one.
  static int TileRows(const GemmProblem& p) {
    const int64_t used = std::min(p.rows, p.experts);
    const int64_t per_expert = used ? p.rows / used : 0;
    if (p.experts == 1) return per_expert <= 16 ? 16 : per_expert <= 32 ? 32 : 64;
    return per_expert <= 10 ? 16 : per_expert <= 24 ? 32 : 64;
  }

  /// fn(kernel, shared memory) for the combination.
  template <class T, bool kOffsets, class Fn>
  static void WithKernel(int rows, Fn&& fn) {
    if (rows == 16)
      fn(&grouped_gemm_sm80<F, T, 16, kOffsets>, SharedBytes<F, 16>());
    else if (rows == 32)
      fn(&grouped_gemm_sm80<F, T, 32, kOffsets>, SharedBytes<F, 32>());
    else
      fn(&grouped_gemm_sm80<F, T, 64, kOffsets>, SharedBytes<F, 64>());
  }

  template <class Fn>
  static void WithKernel(DType dtype, int rows, bool offsets, Fn&& fn) {
    if (dtype == DType::kFloat16)
      offsets ? WithKernel<__half, true>(rows, fn) : WithKernel<__half, false>(rows, fn);
    else
      offsets ? WithKernel<__nv_bfloat16, true>(rows, fn)
              : WithKernel<__nv_bfloat16, false>(rows, fn);
  }

  static void Prepare(DType dtype, int) {
    for (int rows : {16, 32, 64})
      for (bool offsets : {false, true})
        WithKernel(dtype, rows, offsets, [](auto* kernel, int shared_bytes) {
          PrepareKernel("grouped_gemm_sm80", reinterpret_cast<const void*>(kernel), shared_bytes);
        });
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    const int64_t weight_blocks = (args.row_tiles + kBlockTiles - 1) / kBlockTiles;
    WithKernel(args.dtype, args.tile_rows, args.zero_offsets != nullptr,
               [&](auto* kernel, int shared_bytes) {
                 ::qmoe_plugin::Launch("grouped_gemm_sm80", kernel, args.max_tiles * weight_blocks,
                                       kThreads, shared_bytes, stream, args);
               });
  }
};

}  // namespace qmoe_plugin::grouped_gemm_sm80
