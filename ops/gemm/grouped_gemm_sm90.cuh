// grouped_gemm_sm90: float16 and bfloat16 on Hopper's warpgroup tensor instructions, from some rows an expert on.
//
//   grid       persistent: one or two blocks a multiprocessor take work items in turn (Items in pipeline_sm90.cuh)
//   block      64 or 128 weight rows for each of two warpgroups that multiply, by up to 32 or 128 rows of x; and a warpgroup that
//              loads (Produce)
//   multiply   a warpgroup has 1 or 2 stacks of 4 row tiles (64 rows, a warp each) as register operand A, decoded and scaled while
//              the tensor cores work on the stack before, and all rows of x as operand B in swizzled shared memory: wgmma m64nNk16
//              with N = 32, 64, 96 or 128, the least that holds the tile's rows
//   epilogue   32 rows of x and one row tile at a time through shared memory, so that a lane has a row's features side by side: row
//              scale, bias, activation, 16-byte stores
//
// Block scales are folded into the weights, which are then rounded once to the activation type. Two blocks share a multiprocessor
// where tiles are small: decoding limits those, and hides better behind more warps.
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tensor_map.h"
#include "ops/gemm/pipeline_sm90.cuh"

namespace qmoe_plugin::grouped_gemm_sm90 {

inline constexpr int kMinRows = 9;        // an expert; fewer are gemv_sm80's
inline constexpr int kFewestBlocks = 60;  // without experts

/// What a lane needs of one row tile to make operand A of kSteps k16 steps, on its way from shared memory.
template <class F, bool kOffsets>
struct StepCodes {
  LaneCodes<F> codes;                   // of the whole tile; the compiler drops what is not used
  __half2 scale[kSteps], zero[kSteps];  // of rows g and g + 8

  __device__ void Load(const CudaGemmArgs& args, const char* tile_codes, const char* tile_scales,
                       const char* tile_zeros, int first, int lane) {
    codes.LoadShared(tile_codes, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int block = (16 * (first + step)) >> min(args.block_shift, 6);
      const int at = (block * kTileRows + lane / 4 * 2) * 2;
      scale[step] = *reinterpret_cast<const __half2*>(tile_scales + at);
      if constexpr (kOffsets) zero[step] = *reinterpret_cast<const __half2*>(tile_zeros + at);
    }
  }

  /// (centered value + zero offset) * scale, two of each row a register; steps `first` on.
  template <class T>
  __device__ void Decode(const Codebook<F>& codebook, int first, uint32_t (&a)[kSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (!kOffsets && !F::kCodebook && std::is_same_v<T, __half>) {
        __half2 w[4];
        codes.Dequant(codebook, first + step, w);
        const __half2 both[2] = {__low2half2(scale[step]), __high2half2(scale[step])};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[i] = __hmul2(w[i], both[i % 2]);
          a[step][i] = reinterpret_cast<const uint32_t&>(w[i]);
        }
      } else {
        // In float32, so that the weight is rounded once.
        const float2 s = __half22float2(scale[step]);
        float2 offset{};
        if constexpr (kOffsets) offset = __half22float2(zero[step]);
        float2 w[4];
        codes.Dequant(codebook, first + step, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are row g, 1 and 3 row g + 8
          const float o = i % 2 ? offset.y : offset.x, f = i % 2 ? s.y : s.x;
          a[step][i] = PackPair<T>((w[i].x + o) * f, (w[i].y + o) * f);
        }
      }
    }
  }
};

/// Sums of one work item with kN rows of x.
template <class F, class T, int kRows, int kStacks, bool kOffsets, int kN>
__device__ void Multiply(const CudaGemmArgs& args, const Codebook<F>& codebook, int scale_bytes,
                         const char* memory, uint32_t stages, Barriers barriers,
                         RingIndex<Stage<F, kRows, kStacks, kOffsets>::kStages>& ring,
                         float (&sums)[kStacks][kRows / 2]) {
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  const int warp = threadIdx.x / 32 - kGroup / 32, lane = threadIdx.x % 32;
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
#pragma unroll
  for (int s = 0; s < kStacks; ++s)
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sums[s][i] = 0;

  uint32_t a[kStacks][kSteps][4];
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    BarrierWait(barriers.Full(ring.stage), ring.parity);
    FenceAsyncProxy();
    const char* stage = memory + ring.stage * Layout::kBytes;
    const uint64_t x = SwizzledOperand(stages + ring.stage * Layout::kBytes + Layout::kX);
#pragma unroll
    for (int first = 0; first < kFragmentsPerTile; first += kSteps)
#pragma unroll
      for (int s = 0; s < kStacks; ++s) {
        const int tile = warp * kStacks + s;
        StepCodes<F, kOffsets> codes;
        codes.Load(args, stage + Layout::kCodes + tile * TileBytes(F::kBits),
                   stage + Layout::kScales + tile * scale_bytes,
                   stage + Layout::kZeros + tile * scale_bytes, first, lane);
        WgmmaWait<kStacks - 1>();  // the last products with these registers are done
        if (first == 0 && s == kStacks - 1)
          BarrierArriveIf(barriers.Empty(ring.Previous()), k_tile > 0 && lane == 0);
        codes.template Decode<T>(codebook, first, a[s]);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) HoldRegisters(a[s][j]);
        WgmmaFence();
#pragma unroll
        for (int j = 0; j < kSteps; ++j) Wgmma<T, kN>(sums[s], a[s][j], x + 2 * (first + j));
        WgmmaCommit();
      }
    ring.Next();
  }
  WgmmaWait<0>();
  BarrierArriveIf(barriers.Empty(ring.Previous()), lane == 0);
}

/// Writes y of 32 rows of x and one row tile of weights. `sums` is [16, kStagedStride] in shared memory; a lane has a row.
template <class T>
__device__ void StoreRows(const CudaGemmArgs& args, const RowTile& tile, int row_tile, int row,
                          const float* sums) {
  if (row >= tile.row_count) return;
  const int columns = args.gated ? args.n / 2 : args.n;
  const int halves = args.gated ? 1 : 2;  // of 8 columns each
  for (int h = 0; h < halves; ++h) {
    const int column = (row_tile * halves + h) * 8;
    float v[8], up[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = sums[(h * 8 + i) * kStagedStride];
      up[i] = sums[(8 + i) * kStagedStride];
    }
    const ActivationParams activation = args.activation;
    WithActivation(activation.type, [&]<Activation kType>() {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = ActivateAs<kType, true>(activation, v[i], up[i]);
    });
    const int64_t at = (tile.row_begin + int64_t(row)) * args.y_stride + column;
    const uintptr_t y =
        reinterpret_cast<uintptr_t>(args.y) + at * (args.y_is_float ? 4 : sizeof(T));
    if (column + 8 > columns || y % 16 != 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < columns) StoreY<T>(args, tile.row_begin + int64_t(row), column + i, v[i]);
    } else if (args.y_is_float) {
      reinterpret_cast<float4*>(y)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(y)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
      *reinterpret_cast<uint4*>(y) = make_uint4(PackPair<T>(v[0], v[1]), PackPair<T>(v[2], v[3]),
                                                PackPair<T>(v[4], v[5]), PackPair<T>(v[6], v[7]));
    }
  }
}

/// Row scales, biases, activation and stores of a warp's sums, 32 rows of x and one row tile at a time.
template <class T, int kRows, int kStacks>
__device__ void StoreSums(const CudaGemmArgs& args, const RowTile& tile, int first_row_tile,
                          const float (&sums)[kStacks][kRows / 2], float* staged, int lane) {
  const int g = lane / 4, t = lane % 4;
  constexpr int kChunks = kRows / 32;
  float2 scales[kStacks], biases[kStacks];  // of rows g and g + 8
#pragma unroll
  for (int s = 0; s < kStacks; ++s) {
    const int row_tile = min(first_row_tile + s, args.row_tiles - 1);
    const int64_t slot = (int64_t(tile.expert) * args.row_tiles + row_tile) * kTileRows + 2 * g;
    scales[s] = *reinterpret_cast<const float2*>(args.row_scales + slot);
    biases[s] = make_float2(0, 0);
    if (args.bias != nullptr) biases[s] = *reinterpret_cast<const float2*>(args.bias + slot);
  }
#pragma unroll 1
  for (int part = 0; part < kStacks * kChunks; ++part) {
    const int row_tile = first_row_tile + part / kChunks, first_row = part % kChunks * 32;
    if (row_tile >= args.row_tiles || first_row >= tile.row_count) continue;
#pragma unroll
    for (int p = 0; p < kStacks * kChunks; ++p) {  // registers have no run-time index
      if (p != part) continue;
      const float2 scale = scales[p / kChunks], bias = biases[p / kChunks];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float* c = sums[p / kChunks] + (p % kChunks * 4 + n) * 4;
        float* to = staged + g * kStagedStride + n * 8 + 2 * t;
        *reinterpret_cast<float2*>(to) =
            make_float2(c[0] * scale.x + bias.x, c[1] * scale.x + bias.x);
        *reinterpret_cast<float2*>(to + 8 * kStagedStride) =
            make_float2(c[2] * scale.y + bias.y, c[3] * scale.y + bias.y);
      }
    }
    __syncwarp();
    StoreRows<T>(args, tile, row_tile, first_row + lane, staged + lane);
    __syncwarp();
  }
}

template <class F, class T, int kRows, int kStacks, bool kOffsets>
__device__ void Consume(const CudaGemmArgs& args, int scale_bytes, const char* memory,
                        uint32_t stages, Barriers barriers, float* staged) {
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  const int warp = threadIdx.x / 32 - kGroup / 32, lane = threadIdx.x % 32;
  const Codebook<F> codebook(args);
  RingIndex<Layout::kStages> ring;
  const Items<Layout::kTiles> items(args);
  RowTile tile;
  for (unsigned item = blockIdx.x; items.Rows(item, &tile); item += gridDim.x) {
    float sums[kStacks][kRows / 2];
    const auto multiply = [&]<int kN>() {
      Multiply<F, T, kRows, kStacks, kOffsets, kN>(args, codebook, scale_bytes, memory, stages,
                                                   barriers, ring, sums);
    };
    if constexpr (kRows == 32) {
      multiply.template operator()<32>();  // decoding takes the time, not rows of zeros
    } else {
      if (tile.row_count <= 32)
        multiply.template operator()<32>();
      else if (tile.row_count <= 64)
        multiply.template operator()<64>();
      else if (tile.row_count <= 96)
        multiply.template operator()<96>();
      else
        multiply.template operator()<128>();
    }
    StoreSums<T, kRows, kStacks>(args, tile, items.FirstRowTile(item) + warp * kStacks, sums,
                                 staged + warp * kStagedFloats, lane);
  }
}

/// Per channel: ones in all stages, where block scales would be. Nothing overwrites them.
template <class Layout>
__device__ void FillScales(char* memory) {
  constexpr int kWords = Layout::kTiles * kTileScaleBytes / 4;
  for (int index = threadIdx.x; index < Layout::kStages * kWords; index += kThreads) {
    char* stage = memory + index / kWords * Layout::kBytes + Layout::kScales;
    reinterpret_cast<__half2*>(stage)[index % kWords] = __float2half2_rn(1.0f);
  }
}

template <class F, class T, int kRows, int kStacks, bool kOffsets>
__global__ void __launch_bounds__(kThreads, Stage<F, kRows, kStacks, kOffsets>::kBlocksPerSm)
    grouped_gemm_sm90(const __grid_constant__ CudaGemmArgs args,
                      const __grid_constant__ Tensors tensors) {
#ifdef QMOE_HOPPER
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  const uint32_t begin = SharedAddress(DynamicShared()), aligned = (begin + 1023) / 1024 * 1024;
  char* memory = DynamicShared() + (aligned - begin);
  const Barriers barriers{aligned};
  if (threadIdx.x == 0) {
    for (int s = 0; s < Layout::kStages; ++s) {
      BarrierInit(barriers.Full(s), tensors.x_source == XSource::kTensor ? 1 : kGroup + 1);
      BarrierInit(barriers.Empty(s), kConsumers * kGroup / 32);
    }
    BarrierInitDone();
  }
  if (args.block_scales == nullptr) FillScales<Layout>(memory + Layout::kFront);
  __syncthreads();
  WaitForPrevious();
  if (threadIdx.x < kGroup) {
    ShrinkRegisters<Layout::kLoadRegisters>();
    const auto produce = [&]<XSource kSource>() {
      Produce<F, T, kRows, kStacks, kOffsets, kSource>(args, tensors, aligned + Layout::kFront,
                                                       barriers);
    };
    if (tensors.x_source == XSource::kTensor)
      produce.template operator()<XSource::kTensor>();
    else if (tensors.x_source == XSource::kChunks)
      produce.template operator()<XSource::kChunks>();
    else
      produce.template operator()<XSource::kValues>();
  } else {
    GrowRegisters<Layout::kMultiplyRegisters>();
    Consume<F, T, kRows, kStacks, kOffsets>(args, tensors.scale_bytes, memory + Layout::kFront,
                                            aligned + Layout::kFront, barriers,
                                            reinterpret_cast<float*>(memory + Layout::kStaged));
  }
#endif
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = 90, kMaxSm = 90;
  static constexpr int kPriority = 30;
  static constexpr bool kTakesFormat = F::kBits <= 16;  // wider weights are for float32
  static constexpr char kLimits[] =
      "from 9 rows an expert on; without experts 60 blocks of 128 x 128; k a multiple of 8";
  static std::vector<DType> DTypes() { return {DType::kFloat16, DType::kBFloat16}; }

  static std::string Refuse(const GemmProblem& p) {
    if (p.k % 8 != 0) return Concat("k is ", p.k, "; it takes multiples of 8");
    if (const int64_t rows = RowsPerExpert(p); rows < kMinRows)
      return Concat(rows, " rows an expert; it is for ", kMinRows, " and more");
    const int64_t blocks = (p.n + 127) / 128 * ((p.rows + 127) / 128);
    if (p.experts == 1 && blocks < kFewestBlocks)
      return Concat(blocks, " blocks of 128 x 128; with fewer than ", kFewestBlocks,
                    " most of the GPU would be idle, and other kernels slice k");
    if (p.experts * ((p.n + kTileRows - 1) / kTileRows) > INT32_MAX)
      return "more rows of weights than a tensor copy can count";
    return RefuseBlockSize(p);
  }

  /// Small tiles leave room for two blocks on a multiprocessor; but experts with more rows than the average must not need two.
  static int TileRows(const GemmProblem& p) {
    const int64_t rows = RowsPerExpert(p);
    return rows <= (p.experts == 1 ? 32 : 20) ? 32 : 128;
  }

  /// fn(kernel, shared memory, weight row tiles of a block) for the combination.
  template <class Fn>
  static void WithKernel(DType dtype, int rows, int stacks, bool offsets, Fn&& fn) {
    const auto with_stacks = [&]<class T, bool kOffsets, int kRows, int kStacks>() {
      using Layout = Stage<F, kRows, kStacks, kOffsets>;
      fn(&grouped_gemm_sm90<F, T, kRows, kStacks, kOffsets>, Layout::kSharedBytes, Layout::kTiles,
         Layout::kBlocksPerSm);
    };
    const auto with_rows = [&]<class T, bool kOffsets, int kRows>() {
      stacks == 1 ? with_stacks.template operator()<T, kOffsets, kRows, 1>()
                  : with_stacks.template operator()<T, kOffsets, kRows, 2>();
    };
    const auto with_offsets = [&]<class T, bool kOffsets>() {
      rows == 32 ? with_rows.template operator()<T, kOffsets, 32>()
                 : with_rows.template operator()<T, kOffsets, 128>();
    };
    const auto with_type = [&]<class T>() {
      if constexpr (F::kZeroPoints) {
        if (offsets) return with_offsets.template operator()<T, true>();
      }
      with_offsets.template operator()<T, false>();
    };
    dtype == DType::kFloat16 ? with_type.template operator()<__half>()
                             : with_type.template operator()<__nv_bfloat16>();
  }

  static void Prepare(DType dtype, int) {
    for (int rows : {32, 128})
      for (int stacks : {1, 2})
        for (bool offsets : {false, true})
          WithKernel(dtype, rows, stacks, offsets, [&](auto* kernel, int shared_bytes, int, int) {
            PrepareKernel("grouped_gemm_sm90", reinterpret_cast<const void*>(kernel), shared_bytes);
          });
  }

  /// Work items with so many stacks a consumer, if routing is even.
  static int64_t WorkItems(const CudaGemmArgs& args, int stacks) {
    const int64_t experts = args.weight_tiles / args.row_tiles;
    const int64_t used = std::min(args.rows, experts);
    const int64_t tiles = used * ((args.rows / used + args.tile_rows - 1) / args.tile_rows);
    const int block_tiles = kConsumers * stacks * 4;
    return tiles * ((args.row_tiles + block_tiles - 1) / block_tiles);
  }

  /// Two stacks share each load of x and so need less time than twice one's; but half as many items fill the GPU less evenly.
  static int Stacks(const CudaGemmArgs& args) {
    constexpr double kTimeOfOne = 0.58;  // of two, measured
    const int64_t slots = int64_t(args.multiprocessors) * (args.tile_rows == 32 ? 2 : 1);
    const auto rounds = [&](int stacks) {
      return double((WorkItems(args, stacks) + slots - 1) / slots);
    };
    return kTimeOfOne * rounds(1) < rounds(2) ? 1 : 2;
  }

  static Tensors MakeTensors(const CudaGemmArgs& args, int box_tiles) {
    const int blocks = args.block_shift >= 6 ? 1 : kTileK >> args.block_shift;
    const auto rows_of_tiles = [&](const void* data, CUtensorMapDataType type,
                                   int64_t element_bytes, int64_t columns, int64_t box_columns) {
      return MakeTensorMap({.data = data,
                            .type = type,
                            .columns = uint64_t(columns),
                            .rows = uint64_t(args.weight_tiles),
                            .row_bytes = uint64_t(columns * element_bytes),
                            .box_columns = uint32_t(box_columns),
                            .box_rows = uint32_t(box_tiles)});
    };
    const auto scales = [&](const void* data) {
      return rows_of_tiles(data, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                           int64_t(args.groups) * kTileRows, blocks * kTileRows);
    };
    Tensors tensors{};
    tensors.scale_bytes = blocks * kTileRows * 2;
    // In elements of 8 bytes: a box has at most 256.
    tensors.codes = rows_of_tiles(args.codes, CU_TENSOR_MAP_DATA_TYPE_INT64, 8, args.tile_bytes / 8,
                                  TileBytes(F::kBits) / 8);
    if (args.block_scales != nullptr) tensors.scales = scales(args.block_scales);
    if (args.zero_offsets != nullptr) tensors.zeros = scales(args.zero_offsets);
    const bool aligned = (reinterpret_cast<uintptr_t>(args.x) | (args.x_stride * 2)) % 16 == 0;
    tensors.x_source = !aligned                 ? XSource::kValues
                       : args.x_rows != nullptr ? XSource::kChunks
                                                : XSource::kTensor;
    if (tensors.x_source == XSource::kTensor)
      tensors.x = MakeTensorMap({.data = args.x,
                                 .type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16,  // two bytes, any kind
                                 .columns = uint64_t(args.k),
                                 .rows = uint64_t(args.rows),
                                 .row_bytes = uint64_t(args.x_stride) * 2,
                                 .box_columns = kTileK,
                                 .box_rows = uint32_t(args.tile_rows / 2),
                                 .swizzle = CU_TENSOR_MAP_SWIZZLE_128B});
    return tensors;
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    WithKernel(args.dtype, args.tile_rows, Stacks(args), args.zero_offsets != nullptr,
               [&](auto* kernel, int shared_bytes, int tiles, int blocks_per_sm) {
                 const int64_t items = args.max_tiles * ((args.row_tiles + tiles - 1) / tiles);
                 const int64_t most = int64_t(args.multiprocessors) * blocks_per_sm;
                 ::qmoe_plugin::Launch("grouped_gemm_sm90", kernel, std::min(items, most), kThreads,
                                       shared_bytes, args.overlap, stream, args,
                                       MakeTensors(args, tiles));
               });
  }
};

}  // namespace qmoe_plugin::grouped_gemm_sm90
