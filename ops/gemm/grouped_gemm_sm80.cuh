// grouped_gemm_sm80: float16 and bfloat16 on tensor cores, mma.sync.m16n8k16 with float32 sums.
//
//   block     128 weight rows (8 row tiles) x kRows rows of x (16, 32 or 64), by kSplit slices of k: 128 threads each
//             with a pipeline of their own; 4 slices where there are too few blocks to fill the GPU, else 1
//   warp      2 weight row tiles as operand A, all kRows rows of x as operand B: no weight is
//             decoded twice
//   pipeline  kStages stages of 64 k in shared memory, filled by cp.async: x [kRows, 64] swizzled,
//             codes [8 tiles], scales and zero offsets [8 tiles, up to 4 blocks, 16]
//   decode    to centered values, + zero offset: exact but for fractional zero points and codebooks, which are rounded
//             once to the activation type
//   scales    times the float32 sums of each block: at most 32 k are summed before. With 64 rows folded into the weights
//   epilogue  sums meet in shared memory as float32 [kSplit, kRows, 128], slices are added in order; row scale, bias, activation;
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

inline constexpr int kWarps = 4, kThreads = kWarps * 32;  // of a slice of k
inline constexpr int kWarpTiles = 2;                      // weight row tiles of a warp
inline constexpr int kBlockTiles = kWarps * kWarpTiles;   // of a block
inline constexpr int kMaxBlocks = kTileK / 16;  // quantization blocks in a k tile, at most
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

template <class F, int kRows, int kSplit>
constexpr int SharedBytes() {
  const int pipeline = kStages<kRows> * Stage<F, kRows>::kBytes;
  const int sums = kRows * kSumStride * int(sizeof(float));
  return kSplit * (pipeline > sums ? pipeline : sums);
}

inline constexpr int kMostSplit = 4;

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
      : row(threadIdx.x % kThreads / 8), chunk(threadIdx.x % 8) {
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
      : warp(threadIdx.x / 32 % kWarps), lane(threadIdx.x % 32) {
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

/// Operand A of one k16 step of one row tile: centered values, plus their zero offsets, times `scale` if kFold. Unscaled
/// integers and small floats are exact in 16 bits, also with integer zero points.
template <class F, class T, bool kOffsets, bool kFold>
__device__ void DecodeOperand(const LaneCodes<F>& codes, const Codebook<F>& codebook, int j,
                              float2 offset, float2 scale, uint32_t (&a)[4]) {
  constexpr bool kDirect = !kOffsets && !F::kCodebook;
  if constexpr (kDirect && !kFold) {
    T2Of<T> w[4];
    codes.Dequant(codebook, j, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const uint32_t&>(w[i]);
  } else if constexpr (kDirect && std::is_same_v<T, __half>) {
    __half2 w[4];
    codes.Dequant(codebook, j, w);
    const __half2 scales[2] = {__float2half2_rn(scale.x), __float2half2_rn(scale.y)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = __hmul2(w[i], scales[i % 2]);
      a[i] = reinterpret_cast<const uint32_t&>(w[i]);
    }
  } else {
    // In float32, so that the weight is rounded once.
    float2 w[4];
    codes.Dequant(codebook, j, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are row g, 1 and 3 row g + 8
      const float o = i % 2 ? offset.y : offset.x, s = kFold ? i % 2 ? scale.y : scale.x : 1.0f;
      a[i] = PackPair<T>((w[i].x + o) * s, (w[i].y + o) * s);
    }
  }
}

/// Multiplies one stage. Block scales are applied to the sums of each block, in float32: every 16 k if kFine, else every 32;
/// with 64 rows to the weights instead, which are then rounded once: that is a quarter faster.
template <class F, class T, int kRows, bool kOffsets, bool kFine>
__device__ void MultiplyStage(const CudaGemmArgs& args, const Codebook<F>& codebook,
                              const char* stage, int warp, int lane,
                              float (&sums)[kWarpTiles][kRows / 8][4]) {
  using Layout = Stage<F, kRows>;
  constexpr bool kFold = kRows >= 64;
  LaneCodes<F> codes[kWarpTiles];
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i)
    codes[i].LoadShared(stage + Layout::kCodes + (warp * kWarpTiles + i) * TileBytes(F::kBits),
                        lane);

#pragma unroll
  for (int pair = 0; pair < kFragmentsPerTile / 2;
       ++pair) {  // two k16 steps: one ldmatrix of x each 8 rows
    uint32_t a[2][kWarpTiles][4];
    float2 scale[2][kWarpTiles];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int j = pair * 2 + step;
      const int block = kFine ? j : (32 * pair) >> min(args.block_shift, 6);
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const int at =
            (warp * kWarpTiles + i) * Layout::kScaleBytes + (block * kTileRows + lane / 4 * 2) * 2;
        const auto load = [&](int section) {
          return ToFloat2(*reinterpret_cast<const __half2*>(stage + section + at));
        };
        scale[step][i] =
            args.block_scales != nullptr ? load(Layout::kScales) : make_float2(1.0f, 1.0f);
        float2 offset{};
        if constexpr (kOffsets) offset = load(Layout::kOffsets);
        DecodeOperand<F, T, kOffsets, kFold>(codes[i], codebook, j, offset, scale[step][i],
                                             a[step][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      uint32_t b[4];  // k chunks 4 pair to 4 pair + 3 of 8 rows of x
      LoadMatrix4(b, stage + Layout::kX + SwizzledX(n * 8 + lane % 8, pair * 4 + lane / 8));
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        if constexpr (kFold) {
          Mma<T>(sums[i][n], a[0][i], b[0], b[1]);
          Mma<T>(sums[i][n], a[1][i], b[2], b[3]);
          continue;
        }
        float part[4] = {};
        Mma<T>(part, a[0][i], b[0], b[1]);
        if constexpr (kFine) {
          AddScaled(part, scale[0][i], sums[i][n]);
#pragma unroll
          for (int c = 0; c < 4; ++c) part[c] = 0;
        }
        Mma<T>(part, a[1][i], b[2], b[3]);
        AddScaled(part, scale[1][i], sums[i][n]);
      }
    }
  }
}

/// A barrier of one slice's threads.
template <int kSplit>
__device__ void SyncSlice(int slice) {
  if constexpr (kSplit == 1)
    __syncthreads();
  else
    SyncPart<kThreads>(slice + 1);
}

template <class F, class T, int kRows, bool kOffsets, bool kFine, int kSplit>
__global__ void __launch_bounds__(kThreads* kSplit, kSplit > 1    ? 1
                                                    : kRows >= 64 ? 2
                                                                  : 4)
    grouped_gemm_sm80(const __grid_constant__ CudaGemmArgs args) {
  constexpr int kDepth = kStages<kRows>, kStageBytes = Stage<F, kRows>::kBytes;
  const unsigned weight_blocks = (args.row_tiles + kBlockTiles - 1) / kBlockTiles;
  const int first_row_tile = blockIdx.x % weight_blocks * kBlockTiles;
  RowTile tile;
  if (!GetRowTile(args, blockIdx.x / weight_blocks, &tile)) return;
  const int slice = threadIdx.x / kThreads, warp = threadIdx.x / 32 % kWarps;
  const int lane = threadIdx.x % 32;
  char* shared = DynamicShared() + slice * (SharedBytes<F, kRows, kSplit>() / kSplit);

  const XLoader<T, kRows> x_loader(args, tile);
  const WeightLoader<F, kRows> weight_loader(args, tile, first_row_tile);
  // This slice takes every kSplit-th k tile.
  const int k_tiles = ((args.k + kTileK - 1) / kTileK - slice + kSplit - 1) / kSplit;
  const auto load = [&](int index) {
    if (index < k_tiles) {
      const int k_tile = index * kSplit + slice;
      char* stage = shared + index % kDepth * kStageBytes;
      x_loader.Load(args, k_tile, stage + Stage<F, kRows>::kX);
      weight_loader.Load(args, k_tile, stage);
    }
    CopyAsyncCommit();  // an empty group at the end, so that groups and k tiles stay in step
  };

  const Codebook<F> codebook(args);
  float sums[kWarpTiles][kRows / 8][4] = {};
#pragma unroll
  for (int index = 0; index < kDepth - 1; ++index) load(index);
  for (int index = 0; index < k_tiles; ++index) {
    CopyAsyncWait<kDepth - 2>();
    SyncSlice<kSplit>(slice);  // this k tile has arrived for all; the stage of the last one is free
    load(index + kDepth - 1);
    MultiplyStage<F, T, kRows, kOffsets, kFine>(
        args, codebook, shared + index % kDepth * kStageBytes, warp, lane, sums);
  }
  CopyAsyncWait<0>();
  __syncthreads();

  constexpr int kSums = kRows * kSumStride;
  float* all = reinterpret_cast<float*>(DynamicShared());  // [kSplit, kRows, kSumStride]
  float* staged = all + slice * kSums;
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
  if constexpr (kSplit > 1) {
    for (int index = threadIdx.x; index < kSums; index += kThreads * kSplit) {
      float sum = all[index];
#pragma unroll
      for (int s = 1; s < kSplit; ++s) sum += all[s * kSums + index];
      all[index] = sum;
    }
    __syncthreads();
  }
  StoreRowTile<T, kThreads * kSplit, kBlockTiles>(args, tile, first_row_tile, all, kSumStride);
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = kFirstSm, kMaxSm = kLastSm;
  static constexpr int kPriority = 20;
  static constexpr bool kTakesFormat = F::kBits <= 16;  // wider weights are for float32
  static constexpr char kLimits[] = "any number of rows";
  static std::vector<DType> DTypes() { return {DType::kFloat16, DType::kBFloat16}; }

  static std::string Refuse(const GemmProblem& p) { return RefuseBlockSize(p); }

  /// Rows an expert gets on average if routing is even; tiles are larger, so that most experts need
  /// one.
  static int TileRows(const GemmProblem& p) {
    const int64_t per_expert = RowsPerExpert(p);
    if (p.experts == 1) return per_expert <= 16 ? 16 : per_expert <= 32 ? 32 : 64;
    return per_expert <= 10 ? 16 : per_expert <= 24 ? 32 : 64;
  }

  /// fn(kernel, shared memory) for the combination.
  template <class Fn>
  static void WithKernel(DType dtype, int rows, bool offsets, bool fine, bool split, Fn&& fn) {
    const auto with_split = [&]<class T, bool kOffsets, bool kFine, int kRows>() {
      if (kRows > 16 && split) {
        constexpr int kSplit = kRows > 16 ? kMostSplit : 1;  // few rows are gemv_sm80's
        fn(&grouped_gemm_sm80<F, T, kRows, kOffsets, kFine, kSplit>,
           SharedBytes<F, kRows, kSplit>(), kSplit);
      } else {
        fn(&grouped_gemm_sm80<F, T, kRows, kOffsets, kFine, 1>, SharedBytes<F, kRows, 1>(), 1);
      }
    };
    const auto with_rows = [&]<class T, bool kOffsets, bool kFine>() {
      if (rows == 16)
        with_split.template operator()<T, kOffsets, kFine, 16>();
      else if (rows == 32)
        with_split.template operator()<T, kOffsets, kFine, 32>();
      else
        with_split.template operator()<T, kOffsets, kFine, 64>();
    };
    const auto with_blocks = [&]<class T, bool kOffsets>() {
      fine ? with_rows.template operator()<T, kOffsets, true>()
           : with_rows.template operator()<T, kOffsets, false>();
    };
    const auto with_type = [&]<class T>() {
      if constexpr (F::kZeroPoints) {
        if (offsets) return with_blocks.template operator()<T, true>();
      }
      with_blocks.template operator()<T, false>();
    };
    dtype == DType::kFloat16 ? with_type.template operator()<__half>()
                             : with_type.template operator()<__nv_bfloat16>();
  }

  static void Prepare(DType dtype, int sm) {
    for (int rows : {16, 32, 64})
      for (bool offsets : {false, true})
        for (bool fine : {false, true})
          for (bool split : {false, true})
            WithKernel(dtype, rows, offsets, fine, split, [&](auto* kernel, int shared_bytes, int) {
              if (shared_bytes <= SharedLimit(sm))
                PrepareKernel("grouped_gemm_sm80", reinterpret_cast<const void*>(kernel),
                              shared_bytes);
            });
  }

  /// Whether to slice k: blocks that would leave half of the GPU idle, and k tiles to share.
  static bool Splits(const CudaGemmArgs& args, int64_t blocks) {
    return blocks <= args.multiprocessors && args.k >= 8 * kTileK &&
           SharedBytes<F, 64, kMostSplit>() <= SharedLimit(args.sm);
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    const int64_t blocks = args.max_tiles * ((args.row_tiles + kBlockTiles - 1) / kBlockTiles);
    WithKernel(args.dtype, args.tile_rows, args.zero_offsets != nullptr, args.block_shift == 4,
               Splits(args, blocks), [&](auto* kernel, int shared_bytes, int split) {
                 ::qmoe_plugin::Launch("grouped_gemm_sm80", kernel, blocks, kThreads * split,
                                       shared_bytes, stream, args);
               });
  }
};

}  // namespace qmoe_plugin::grouped_gemm_sm80
