// grouped_gemm_sm90: float16 and bfloat16 on Hopper's warpgroup tensor instructions, from some rows an expert on.
//
//   grid       persistent: one or two blocks a multiprocessor take work items as they get free (WorkQueue in pipeline_sm90.cuh)
//   block      128 or 256 weight rows, half of them for each of two warpgroups that multiply, by up to 32, 96, 128 or 256 rows of x; and a
//              warpgroup whose first thread loads all that by tensor copies (Produce). Rows of x are sorted beforehand
//   multiply   a warpgroup has 1 or 2 stacks of 4 row tiles (64 rows, a warp each) as register operand A, decoded and scaled while
//              the tensor cores work on the part before, and all rows of x as operand B in swizzled shared memory: wgmma m64nNk16,
//              N being a multiple of 16 that holds the tile's rows
//   epilogue   epilogue_sm90.cuh
//
// Block scales are folded into the weights (decode_sm90.cuh). Two blocks share a multiprocessor where tiles are small: decoding limits
// those, and hides better behind more warps. 256 rows of x are decoded for once; but with few of them two stacks, which share x, are
// faster.
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tensor_map.h"
#include "ops/gemm/decode_sm90.cuh"
#include "ops/gemm/epilogue_sm90.cuh"
#include "ops/gemm/pipeline_sm90.cuh"

namespace qmoe_plugin::grouped_gemm_sm90 {

inline constexpr int kMinRows = 9;        // an expert; fewer are gemv_sm80's
inline constexpr int kFewestBlocks = 60;  // without experts
/// Rows an expert on average, up to which tiles have 32, 96 and 128 rows; hardly one then has more than a tile.
inline constexpr int kMaxRowsOf32 = 20, kMaxRowsOf96 = 68, kMaxRowsOf128 = 112;

template <class F, int kRows, int kStacks, Offsets kOffsets>
using Ring = RingIndex<Stage<F, kRows, kStacks, kOffsets>::kStages,
                       Stage<F, kRows, kStacks, kOffsets>::kBytes>;

/// Sums of one work item with up to kN rows of x.
template <class F, class T, int kRows, int kStacks, Offsets kOffsets, int kN>
__device__ void Multiply(const CudaGemmArgs& args, const Codebook<F>& codebook, int scale_bytes,
                         const char* memory, uint32_t stages, Barriers barriers,
                         Ring<F, kRows, kStacks, kOffsets>& ring,
                         float (&sums)[kStacks][kRows / 2]) {
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  constexpr int kSteps = Layout::kSteps;
  constexpr int kParts = kFragmentsPerTile / kSteps * kStacks;  // of a k tile, decoded in turn
  const int warp = threadIdx.x / 32 - kGroup / 32, lane = threadIdx.x % 32;
  const int k_tiles = (args.k + kTileK - 1) / kTileK;
#pragma unroll
  for (int s = 0; s < kStacks; ++s)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[s][i] = 0;

  // Where steps share a scale, a lane's codes and scales of a k tile are loaded together: codes of 4 bits at once.
  constexpr int kLoadSteps = kScaleSteps<F, kOffsets> > 1 ? kFragmentsPerTile : kSteps;
  // Places of this lane's in a stage. They stay in registers: computed anew for each k tile, they would be a tenth of the instructions.
  int codes_at =
      Layout::kCodes + warp * kStacks * TileBytes(F::kBits) + lane * LaneChunkBytes(F::kBits);
  int scales_at = Layout::kScales + warp * kStacks * scale_bytes + lane / 4 * 4;
  Renew(codes_at), Renew(scales_at), Renew(scale_bytes);

  uint32_t a[2][kSteps][4];  // a part is decoded while the tensor cores work on the one before
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    BarrierWait(barriers.Full(ring.stage), ring.parity);
    const char* stage = memory + ring.offset;
    const uint64_t x = SwizzledOperand(stages + ring.offset + Layout::kX);
    const auto first_step = [](int part) { return part / kStacks * kSteps; };
    StepCodes<F, T, kOffsets, kLoadSteps> codes[kStacks];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int s = part % kStacks, first = first_step(part) % kLoadSteps;
      if (first == 0)
        codes[s].Load(args, stage + codes_at + s * TileBytes(F::kBits),
                      stage + scales_at + s * scale_bytes,
                      stage + (Layout::kZeros - Layout::kScales) + scales_at + s * scale_bytes,
                      first_step(part));
      WgmmaWait<1>();  // the last products with these registers are done
      if (part == 1)   // and so are all of the stage before
        BarrierArriveIf(barriers.Empty(ring.Previous()), k_tile > 0 && lane == 0);
      codes[s].Decode(codebook, first, a[part % 2]);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) HoldRegisters(a[part % 2][j]);
      WgmmaFence();
#pragma unroll
      for (int j = 0; j < kSteps; ++j)
        Wgmma<T, kN>(sums[s], a[part % 2][j], x + 2 * (first_step(part) + j));
      WgmmaCommit();
    }
    ring.Next();
  }
  WgmmaWait<0>();
  BarrierArriveIf(barriers.Empty(ring.Previous()), lane == 0);
}

/// Calls fn.template operator()<n>() for an n that holds so many rows. Time grows with n, but each one has registers of its own, and with
/// more of them there are none left.
template <int kRows, class Fn>
__device__ void WithRows(int rows, const Fn& fn) {
  if constexpr (kRows == 32) {
    fn.template operator()<32>();
  } else if constexpr (kRows == 96) {
    if (rows > 80) return fn.template operator()<96>();
    if (rows > 64) return fn.template operator()<80>();
    if (rows > 48) return fn.template operator()<64>();
    if (rows > 32) return fn.template operator()<48>();
    fn.template operator()<32>();
  } else if constexpr (kRows == 128) {
    if (rows > 96) return fn.template operator()<128>();
    if (rows > 80) return fn.template operator()<96>();
    if (rows > 64) return fn.template operator()<80>();
    fn.template operator()<64>();
  } else {
    static_assert(kRows == 256);
    if (rows > 192) return fn.template operator()<256>();
    if (rows > 160) return fn.template operator()<192>();
    if (rows > 128) return fn.template operator()<160>();
    if (rows > 96) return fn.template operator()<128>();
    if (rows > 64) return fn.template operator()<96>();
    fn.template operator()<64>();
  }
}

template <class F, class T, int kRows, int kStacks, Offsets kOffsets>
__device__ void Consume(const CudaGemmArgs& args, int scale_bytes, const char* memory,
                        uint32_t stages, Barriers barriers,
                        typename Stage<F, kRows, kStacks, kOffsets>::Queue queue, char* staged) {
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  const int group = threadIdx.x / kGroup - 1;
  const Codebook<F> codebook(args);
  Ring<F, kRows, kStacks, kOffsets> ring;
  while (const auto* work = queue.Pop()) {
    float sums[kStacks][kRows / 2];
    const auto multiply = [&]<int kN>() {
      Multiply<F, T, kRows, kStacks, kOffsets, kN>(args, codebook, scale_bytes, memory, stages,
                                                   barriers, ring, sums);
    };
    WithRows<kRows>(work->rows.row_count, multiply);
    StoreSums<T, Layout>(args, *work, group * (4 * kStacks), SumFactor<F, T, kOffsets>(), sums,
                         staged + group * Layout::kStagedBytes, 1 + group);
    queue.Done();
  }
}

/// A number in all stages, where block scales or zero offsets would be. Nothing overwrites them.
template <class Layout>
__device__ void FillStages(char* memory, int place, float value) {
  constexpr int kWords = Layout::kTiles * kTileScaleBytes / 4;
  for (int index = threadIdx.x; index < Layout::kStages * kWords; index += kThreads) {
    char* stage = memory + index / kWords * Layout::kBytes + place;
    reinterpret_cast<__half2*>(stage)[index % kWords] = __float2half2_rn(value);
  }
}

template <class F, class T, int kRows, int kStacks, Offsets kOffsets>
__global__ void __launch_bounds__(kThreads, Stage<F, kRows, kStacks, kOffsets>::kBlocksPerSm)
    grouped_gemm_sm90(const __grid_constant__ CudaGemmArgs args,
                      const __grid_constant__ Tensors tensors) {
#ifdef QMOE_HOPPER
  using Layout = Stage<F, kRows, kStacks, kOffsets>;
  const uint32_t begin = SharedAddress(DynamicShared()), aligned = (begin + 1023) / 1024 * 1024;
  char* memory = DynamicShared() + (aligned - begin);
  const Barriers barriers{aligned};
  const typename Layout::Queue queue(aligned + Layout::kQueue, memory + Layout::kQueue);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Layout::kStages; ++s) {
      BarrierInit(barriers.Full(s), tensors.x_source == XSource::kTensor ? 1 : kGroup + 1);
      BarrierInit(barriers.Empty(s), kConsumers * kGroup / 32);
    }
    queue.Init(kConsumers * kGroup / 32);
    BarrierInitDone();
  }
  if (args.block_scales == nullptr)
    FillStages<Layout>(memory + Layout::kFront, Layout::kScales, 1);  // per channel
  if (kOffsets != Offsets::kNone && args.zero_offsets == nullptr)
    FillStages<Layout>(memory + Layout::kFront, Layout::kZeros, 0);
  __syncthreads();
  WaitForPrevious();
  LetNextStart();  // on each multiprocessor that is free; what this kernel waited for, that one need not wait for
  if (threadIdx.x < kGroup) {
    ShrinkRegisters<Layout::kLoadRegisters>();
    if (tensors.x_source == XSource::kTensor)
      Produce<F, T, kRows, kStacks, kOffsets, XSource::kTensor>(
          args, tensors, aligned + Layout::kFront, barriers, queue);
    else
      Produce<F, T, kRows, kStacks, kOffsets, XSource::kValues>(
          args, tensors, aligned + Layout::kFront, barriers, queue);
  } else {
    GrowRegisters<Layout::kMultiplyRegisters>();
    Consume<F, T, kRows, kStacks, kOffsets>(args, tensors.scale_bytes, memory + Layout::kFront,
                                            aligned + Layout::kFront, barriers, queue,
                                            memory + Layout::kStaged);
  }
#endif
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = 90, kMaxSm = 90;
  static constexpr int kPriority = 30;
  static constexpr bool kWantsSortedX = true;           // tensor copies do not gather
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

  /// Small tiles leave room for two blocks on a multiprocessor; but experts with more rows than the average must not need two. With
  /// many rows a weight is decoded once for up to 256 of them.
  static int TileRows(const GemmProblem& p) {
    const int64_t rows = RowsPerExpert(p);
    if (p.experts == 1) return rows <= 32 ? 32 : DenseTileRows(p);
    return rows <= kMaxRowsOf32    ? 32
           : rows <= kMaxRowsOf96  ? 96
           : rows <= kMaxRowsOf128 ? 128
                                   : 256;
  }

  /// Without experts: rows that keep all of the GPU busy for the shortest time.
  static int DenseTileRows(const GemmProblem& p) {
    constexpr int kMultiprocessors = 132,
                  kBlockRows = Stage<F, 256, 1, Offsets::kNone>::kTiles * kTileRows;
    int best = 0;
    int64_t least = INT64_MAX;
    for (int rows = 256; rows >= 64; rows -= 32) {
      const int64_t items = (p.rows + rows - 1) / rows * ((p.n + kBlockRows - 1) / kBlockRows);
      const int64_t rounds = (items + kMultiprocessors - 1) / kMultiprocessors;
      const int64_t time = rounds * std::max(4 * rows, 530 + rows);  // clocks a k tile, measured
      if (time < least) least = time, best = rows;
    }
    return best;
  }

  /// Whether values or block scales may have more bits than T.
  template <class T>
  static constexpr bool kMayBeLong =
      std::is_same_v<T, __nv_bfloat16> && !F::kCodebook && F::kPlainType == DType::kUndefined;

  static Offsets OffsetsOf(const CudaGemmArgs& args) {
    const bool short_factors = args.dtype == DType::kFloat16 || args.short_factors;
    if (args.zero_offsets == nullptr) {
      if (!short_factors && kMayBeLong<__nv_bfloat16>) return Offsets::kAny;
      return F::kAffine && !FitAffine(args) ? Offsets::kIntegers : Offsets::kNone;  // zeros
    }
    return short_factors && args.integer_offsets ? Offsets::kIntegers : Offsets::kAny;
  }

  /// fn(kernel, its stage) for the combination. rows: of a tile, at most.
  template <class Fn>
  static void WithKernel(DType dtype, int rows, int stacks, Offsets offsets, Fn&& fn) {
    const auto with_stacks = [&]<class T, Offsets kOffsets, int kRows, int kStacks>() {
      using Layout = Stage<F, kRows, kStacks, kOffsets>;
      fn(&grouped_gemm_sm90<F, T, kRows, kStacks, kOffsets>, Layout{});
    };
    const auto with_offsets = [&]<class T, Offsets kOffsets>() {
      if (rows == 32)
        stacks == 1 ? with_stacks.template operator()<T, kOffsets, 32, 1>()
                    : with_stacks.template operator()<T, kOffsets, 32, 2>();
      else if (stacks == 1)  // from here on the sums fill the registers
        with_stacks.template operator()<T, kOffsets, 256, 1>();
      else
        rows == 96 ? with_stacks.template operator()<T, kOffsets, 96, 2>()
                   : with_stacks.template operator()<T, kOffsets, 128, 2>();
    };
    const auto with_type = [&]<class T>() {
      if constexpr (F::kZeroPoints)
        if (offsets == Offsets::kIntegers)
          return with_offsets.template operator()<T, Offsets::kIntegers>();
      if constexpr (F::kZeroPoints || kMayBeLong<T>)
        if (offsets == Offsets::kAny) return with_offsets.template operator()<T, Offsets::kAny>();
      with_offsets.template operator()<T, Offsets::kNone>();
    };
    dtype == DType::kFloat16 ? with_type.template operator()<__half>()
                             : with_type.template operator()<__nv_bfloat16>();
  }

  static void Prepare(DType dtype, int) {
    struct Tile {
      int rows, stacks;
    };
    for (const Tile tile : {Tile{32, 1}, Tile{32, 2}, Tile{96, 2}, Tile{128, 2}, Tile{256, 1}})
      for (Offsets offsets : {Offsets::kNone, Offsets::kIntegers, Offsets::kAny})
        WithKernel(dtype, tile.rows, tile.stacks, offsets, [&]<class Layout>(auto* kernel, Layout) {
          PrepareKernel("grouped_gemm_sm90", reinterpret_cast<const void*>(kernel),
                        Layout::kSharedBytes);
        });
  }

  /// Work items with so many stacks a consumer, if routing is even.
  static int64_t WorkItems(const CudaGemmArgs& args, int stacks) {
    const int64_t experts = args.weight_tiles / args.row_tiles;
    const int64_t used = std::min(args.rows, experts);
    const int64_t tiles = used * ((args.rows / used + args.tile_rows - 1) / args.tile_rows);
    const int block_tiles = 8 * stacks;
    return tiles * ((args.row_tiles + block_tiles - 1) / block_tiles);
  }

  static int Stacks(const CudaGemmArgs& args) {
    if (args.tile_rows > 32) return args.tile_rows <= 128 && args.tiles != nullptr ? 2 : 1;
    // Two stacks share each load of x and so need less time than twice one's; but half as many items fill the GPU less evenly.
    constexpr double kTimeOfOne = 0.58;  // of two, measured
    const int64_t slots = int64_t(args.multiprocessors) * 2;
    const auto rounds = [&](int stacks) {
      return double((WorkItems(args, stacks) + slots - 1) / slots);
    };
    return kTimeOfOne * rounds(1) < rounds(2) ? 1 : 2;
  }

  static Tensors MakeTensors(const CudaGemmArgs& args, int box_tiles, int box_rows) {
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
    tensors.x_source = aligned && args.x_rows == nullptr ? XSource::kTensor : XSource::kValues;
    const auto boxes_of_x = [&](int rows) {
      return MakeTensorMap({.data = args.x,
                            .type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16,  // two bytes, any kind
                            .columns = uint64_t(args.k),
                            .rows = uint64_t(args.rows),
                            .row_bytes = uint64_t(args.x_stride) * 2,
                            .box_columns = kTileK,
                            .box_rows = uint32_t(rows),
                            .swizzle = CU_TENSOR_MAP_SWIZZLE_128B});
    };
    if (tensors.x_source == XSource::kTensor)
      tensors.x = boxes_of_x(box_rows), tensors.x_half = boxes_of_x(box_rows / 2);
    return tensors;
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    const Offsets offsets = OffsetsOf(args);
    WithKernel(
        args.dtype, args.tile_rows, Stacks(args), offsets, [&]<class Layout>(auto* kernel, Layout) {
          const int64_t weight_blocks = (args.row_tiles + Layout::kTiles - 1) / Layout::kTiles;
          const int64_t items = args.max_tiles * weight_blocks;
          const int64_t most = int64_t(args.multiprocessors) * Layout::kBlocksPerSm;
          ::qmoe_plugin::Launch("grouped_gemm_sm90", kernel, std::min(items, most), kThreads,
                                Layout::kSharedBytes, args.overlap, stream, args,
                                MakeTensors(args, Layout::kTiles, Layout::kBoxRows));
        });
  }
};

}  // namespace qmoe_plugin::grouped_gemm_sm90
