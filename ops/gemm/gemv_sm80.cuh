// gemv_sm80: few rows, float16 and bfloat16, on tensor cores by mma.sync.m16n8k16; made to read weights as fast as memory
// gives them, so the instructions spent on a k tile are what counts.
//
//   block      8 warps = `split` slices of k for each of 8 / split weight row tiles x up to 8 rows of x
//   warp       takes every split-th k tile of its row tile; codes and scales go straight to registers, kDepth tiles ahead
//   x          [rows, chunk of k] in shared memory, zeros beyond K; usually all of K at once
//   product    weights are operand A as they are stored, centered and exact (no scale folded in); x is operand B by
//              ldmatrix. The sum of each block (at most 32 k) is scaled in float32, so the only rounding is float32's.
//              Zero offsets: block sums of x come from one more mma, with A = 1.
//   end        the slices' sums meet in shared memory and are added in their order
//
// Rows of x that are not there repeat row 0 and are not stored: columns of an mma do not mix. Chosen for few rows in all.
// Refuses more: there blocks that share x among more weights are faster (grouped_gemm_sm80).
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tile.cuh"
#include "ops/gemm/gemm.cuh"

namespace qmoe_plugin::gemv_sm80 {

inline constexpr int kWarps = 8, kThreads = kWarps * 32;
inline constexpr int kRows = 8;  // of x: one n8 tile
inline constexpr int kSumStride =
    kWarps * kTileRows + 4;               // floats of a row of sums; + 4: no bank conflicts
inline constexpr int kXBytes = 64 << 10;  // of x in shared memory, at most
inline constexpr int kSumBytes = kRows * kSumStride * int(sizeof(float));

/// k tiles in flight, a warp: 2 KB of codes.
template <class F>
inline constexpr int kDepth = F::kBits == 8 ? 2 : 4;

/// How block scales lie along k: none, one every 16, or one every 32 or more.
enum class Blocks { kPerChannel, k16, k32 };

/// How a launch is cut.
struct Plan {
  int split;        // slices of k
  int chunk_tiles;  // k tiles of x in shared memory at once
  int x_stride;     // bytes of a row of x there; 16 mod 128: ldmatrix without bank conflicts
};

/// What a lane holds of a k tile: codes, and scales and zero offsets of its rows g and g + 8 for each block.
template <class F, Blocks kBlocks, bool kOffsets>
struct WeightTile {
  static constexpr int kPairs = kBlocks == Blocks::k16 ? 4 : kBlocks == Blocks::k32 ? 2 : 1;
  LaneCodes<F> codes;
  __half2 scales[kPairs], offsets[kPairs];

  /// `code` is the lane's first chunk of k tile 0, `scale` and `offset` its pairs of block 0.
  __device__ void Load(const uint8_t* code, const __half2* scale, const __half2* offset,
                       int block_shift, int k_tile) {
    codes.LoadGlobal(code + int64_t(k_tile) * TileBytes(F::kBits), 0);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      // 8 pairs a block; per channel there is one block.
      const unsigned slot =
          kBlocks == Blocks::kPerChannel
              ? 0
              : unsigned((k_tile * kTileK + kTileK / kPairs * p) >> block_shift) * 8;
      if constexpr (kBlocks != Blocks::kPerChannel) scales[p] = __ldg(scale + slot);
      if constexpr (kOffsets) offsets[p] = __ldg(offset + slot);
    }
  }
};

/// Rows of x from k tile `first` on, `tiles` of them, to shared memory.
template <class T>
__device__ void StageX(const CudaGemmArgs& args, const RowTile& tile, int first, int tiles,
                       int x_stride, char* shared) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(args.x) | (args.x_stride * sizeof(T));
  const bool aligned = bits % 16 == 0 && args.k % 8 == 0;
  for (int row = 0; row < tile.row_count; ++row) {
    const T* source = XRow<T>(args, tile.row_begin + row);
    for (int chunk = threadIdx.x; chunk < tiles * 8; chunk += kThreads) {
      const int k = first * kTileK + chunk * 8;
      uint4 value{};
      if (aligned) {
        if (k < args.k) value = *reinterpret_cast<const uint4*>(source + k);
      } else {
        T* values = reinterpret_cast<T*>(&value);
        for (int e = 0; e < 8; ++e)
          if (k + e < args.k) values[e] = source[k + e];
      }
      *reinterpret_cast<uint4*>(shared + row * x_stride + chunk * 16) = value;
    }
  }
}

template <class T>
using T2Of = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

/// Adds sums of rows g (0, 1) and g + 8 (2, 3), each times its half of `scale`.
__device__ inline void AddScaled(const float (&part)[4], __half2 scale, float (&sums)[4]) {
  const float2 s = __half22float2(scale);
  sums[0] += part[0] * s.x, sums[1] += part[1] * s.x;
  sums[2] += part[2] * s.y, sums[3] += part[3] * s.y;
}

/// Adds one k tile to the lane's sums. `x` is where this lane's ldmatrix row lies in the tile.
template <class F, class T, Blocks kBlocks, bool kOffsets>
__device__ void Accumulate(const CudaGemmArgs& args, const WeightTile<F, kBlocks, kOffsets>& tile,
                           const char* x, float (&sums)[4]) {
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  constexpr uint32_t kOnesA[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
  for (int pair = 0; pair < kFragmentsPerTile / 2; ++pair) {
    uint32_t b[4];
    LoadMatrix4(b, x + pair * 64);
    float part[4] = {}, x_sum[4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      T2Of<T> w[4];
      uint32_t a[4];
      tile.codes.Dequant(Codebook<F>(args), 2 * pair + step, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const uint32_t&>(w[i]);
      constexpr bool kDirect = kBlocks == Blocks::kPerChannel && !kOffsets;
      Mma<T>(kDirect ? sums : part, a, b[2 * step], b[2 * step + 1]);
      if constexpr (kOffsets) Mma<T>(x_sum, kOnesA, b[2 * step], b[2 * step + 1]);
      if (kDirect || (kBlocks != Blocks::k16 && step == 0)) continue;
      const int p = kBlocks == Blocks::k16 ? 2 * pair + step : kBlocks == Blocks::k32 ? pair : 0;
      if constexpr (kOffsets) AddScaled(x_sum, tile.offsets[p], part);
      AddScaled(part, kBlocks == Blocks::kPerChannel ? __float2half2_rn(1.0f) : tile.scales[p],
                sums);
#pragma unroll
      for (int c = 0; c < 4; ++c) part[c] = x_sum[c] = 0;
    }
  }
}

/// Adds up the slices of each row tile, in their order, and stores the results. `staged` is [kRows, kSumStride], 16 sums of
/// each warp.
template <class T, int kSplit>
__device__ void Finish(const CudaGemmArgs& args, const RowTile& tile, int first_row_tile,
                       float* staged) {
  constexpr int kBlockTiles = kWarps / kSplit, kColumns = kBlockTiles * kTileRows;
  constexpr int kPerThread = (kRows * kColumns + kThreads - 1) / kThreads;
  float totals[kPerThread] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kColumns, column = index % kColumns;
    if (row >= kRows) continue;
    const float* parts =
        staged + row * kSumStride + column / kTileRows * kSplit * kTileRows + column % kTileRows;
#pragma unroll
    for (int s = 0; s < kSplit; ++s) totals[i] += parts[s * kTileRows];
  }
  __syncthreads();  // all have read: row tiles move together
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kColumns;
    if (row < kRows) staged[row * kSumStride + index % kColumns] = totals[i];
  }
  __syncthreads();
  StoreRowTile<T, kThreads, kBlockTiles>(args, tile, first_row_tile, staged, kSumStride);
}

template <class F, class T, Blocks kBlocks, bool kOffsets>
__global__ void __launch_bounds__(kThreads, kOffsets || F::kBits == 8 ? 2 : 3)
    gemv_sm80(const __grid_constant__ CudaGemmArgs args, const __grid_constant__ Plan plan) {
  constexpr int kDeep = kDepth<F>;
  const int split = plan.split, block_tiles = kWarps / split;  // weight row tiles of a block
  const unsigned weight_blocks = (args.row_tiles + block_tiles - 1) / block_tiles;
  const int first_row_tile = blockIdx.x % weight_blocks * block_tiles;
  RowTile tile;
  if (!GetRowTile(args, blockIdx.x / weight_blocks, &tile)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Row tiles beyond the last repeat it; what they give is not stored.
  const int row_tile = min(first_row_tile + warp / split, args.row_tiles - 1);
  char* shared = DynamicShared();

  const uint8_t* codes = TileCodes(args, tile.expert, row_tile) + lane * LaneChunkBytes(F::kBits);
  const int64_t slots = TileScales(args, tile.expert, row_tile) / 2 + lane / 4;  // pairs
  const __half2* scales = static_cast<const __half2*>(args.block_scales) + slots;
  const __half2* offsets = static_cast<const __half2*>(args.zero_offsets) + slots;
  // Keep them: the compiler would rather compute them anew for each tile.
  asm volatile("" : "+l"(codes), "+l"(scales), "+l"(offsets));
  const int x_row = lane % 8 < tile.row_count ? lane % 8 : 0;
  const char* lane_x = shared + x_row * plan.x_stride + lane / 8 * 16;

  float sums[4] = {};
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
  for (int begin = 0; begin < k_tiles; begin += plan.chunk_tiles) {
    const int end = min(begin + plan.chunk_tiles, k_tiles);
    // This warp's tiles: every split-th, the first ones loaded before anybody waits.
    int k_tile = begin + warp % split;
    WeightTile<F, kBlocks, kOffsets> weights[kDeep];
#pragma unroll
    for (int d = 0; d < kDeep; ++d)
      if (k_tile + d * split < end)
        weights[d].Load(codes, scales, offsets, args.block_shift, k_tile + d * split);
    if (begin > 0) __syncthreads();  // the last chunk of x has been read
    StageX<T>(args, tile, begin, end - begin, plan.x_stride, shared);
    __syncthreads();
    const char* x = lane_x + (k_tile - begin) * (kTileK * 2);
    while (k_tile < end) {
#pragma unroll
      for (int d = 0; d < kDeep; ++d) {
        if (k_tile >= end) break;
        Accumulate<F, T, kBlocks, kOffsets>(args, weights[d], x, sums);
        if (const int next = k_tile + kDeep * split; next < end)
          weights[d].Load(codes, scales, offsets, args.block_shift, next);
        k_tile += split;
        x += split * (kTileK * 2);
      }
    }
  }
  __syncthreads();  // x has been read

  float* staged = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int row = lane % 4 * 2 + c % 2, tile_row = lane / 4 + c / 2 * 8;
    staged[row * kSumStride + warp * kTileRows + tile_row] = sums[c];
  }
  __syncthreads();
  if (split == 8)
    Finish<T, 8>(args, tile, first_row_tile, staged);
  else if (split == 4)
    Finish<T, 4>(args, tile, first_row_tile, staged);
  else
    Finish<T, 2>(args, tile, first_row_tile, staged);
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = kFirstSm, kMaxSm = kLastSm;
  static constexpr int kPriority = 40;
  static constexpr char kLimits[] = "few rows: at most 16 over all experts, 4 without experts";
  static std::vector<DType> DTypes() { return {DType::kFloat16, DType::kBFloat16}; }

  static std::string Refuse(const GemmProblem& p) {
    if (F::kCodebook) return "values of a codebook are not exact in 16 bits";
    // Each block brings all rows of x to its shared memory; for more rows that outweighs the weights.
    const int64_t most = p.experts == 1 ? 4 : 16;
    if (p.rows > most) return Concat(p.rows, " rows; it takes at most ", most);
    return RefuseBlockSize(p);
  }

  static int TileRows(const GemmProblem&) { return kRows; }

  static Plan MakePlan(const CudaGemmArgs& args) {
    const int k_tiles = (args.k + kTileK - 1) / kTileK;
    const int rows = int(std::min<int64_t>(kRows, args.rows));
    Plan plan;
    // As many slices as leave each warp some k tiles to overlap; but few row tiles must fill the GPU too.
    plan.split = k_tiles >= 24 || args.row_tiles <= 64 ? 8 : k_tiles >= 10 ? 4 : 2;
    plan.chunk_tiles = std::min(k_tiles, kXBytes / (rows * kTileK * 2));
    plan.x_stride = plan.chunk_tiles * kTileK * 2 + 16;
    return plan;
  }

  /// fn(kernel) for the combination.
  template <class Fn>
  static void WithKernel(DType dtype, Blocks blocks, bool offsets, Fn&& fn) {
    if constexpr (F::kCodebook) return;  // refused
    const auto with_type = [&](auto type) {
      using T = decltype(type);
      const auto with_blocks = [&]<Blocks kBlocks>() {
        offsets ? fn(&gemv_sm80<F, T, kBlocks, true>) : fn(&gemv_sm80<F, T, kBlocks, false>);
      };
      if (blocks == Blocks::kPerChannel)
        with_blocks.template operator()<Blocks::kPerChannel>();
      else if (blocks == Blocks::k16)
        with_blocks.template operator()<Blocks::k16>();
      else
        with_blocks.template operator()<Blocks::k32>();
    };
    dtype == DType::kFloat16 ? with_type(__half()) : with_type(__nv_bfloat16());
  }

  static void Prepare(DType dtype) {
    for (Blocks blocks : {Blocks::kPerChannel, Blocks::k16, Blocks::k32})
      for (bool offsets : {false, true})
        WithKernel(dtype, blocks, offsets, [](auto* kernel) {
          PrepareKernel("gemv_sm80", reinterpret_cast<const void*>(kernel), kXBytes + kRows * 16);
        });
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    const Plan plan = MakePlan(args);
    const int rows = int(std::min<int64_t>(kRows, args.rows));
    const int block_tiles = kWarps / plan.split;
    const int64_t weight_blocks = (args.row_tiles + block_tiles - 1) / block_tiles;
    const int shared_bytes = std::max(rows * plan.x_stride, kSumBytes);
    const Blocks blocks = args.block_scales == nullptr ? Blocks::kPerChannel
                          : args.block_shift == 4      ? Blocks::k16
                                                       : Blocks::k32;
    WithKernel(args.dtype, blocks, args.zero_offsets != nullptr, [&](auto* kernel) {
      ::qmoe_plugin::Launch("gemv_sm80", kernel, args.max_tiles * weight_blocks, kThreads,
                            shared_bytes, stream, args, plan);
    });
  }
};

}  // namespace qmoe_plugin::gemv_sm80
