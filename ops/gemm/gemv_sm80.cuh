// gemv_sm80: few rows an expert, float16 and bfloat16, by mma.sync.m16n8k16. It reads weights as fast as memory gives them, so
// what counts is the instructions spent on a k tile, and that every multiprocessor has loads in flight all the time.
//
//   unit       one weight row tile (16 rows, all of K) of one slot; a slot is an expert with its up to 8 or 16 rows of x
//   grid       one block a multiprocessor; each takes a contiguous range of units, of equal cost
//   block      16 warps share the range's k tiles evenly, wherever units begin and end: all finish together
//   warp       streams its k tiles by cp.async through a ring of its own, 4 KB of codes in flight; no barriers but its own
//   x          rows of the block's slots in shared memory, all of K: [slot, row, K], zeros beyond K; quantised there if need be
//   product    weights are operand A as they are stored, centered and exact (no scale folded in); x is operand B by ldmatrix.
//              The sum of each block (at most 64 k) is scaled in float32, so the only rounding is float32's. Zero offsets that
//              are integers are added to the weights; for others block sums of x come from one more mma, with A = 1
//              (weight_products.cuh).
//   end        a warp that had all of a unit finishes it from its registers; units of several warps meet in shared memory and
//              are added in the order of k
//
// Rows of x that are not there repeat row 0 and are not stored: columns of an mma do not mix. With few tokens it routes by
// itself (ops/gemm/fused_route.cuh), and fc2 starts while fc1 runs; with one token fc2 also adds up what the experts give.
// Refuses more rows than pay, and rows of x that do not fit.
#pragma once

#include "ops/common/cuda_host.h"
#include "ops/common/tile.cuh"
#include "ops/gemm/fused_route.cuh"
#include "ops/gemm/gemm.cuh"
#include "ops/gemm/weight_products.cuh"
#include "ops/gemm/weight_stream.cuh"
#include "ops/gemm/weight_units.cuh"

namespace qmoe_plugin::gemv_sm80 {

using Blocks = ScaleBlocks;

/// Sums of units that several warps share, [n8 tile, lane, 4]: each warp's of its first unit. Those of its last one, when it has read
/// all its weights, lie in its ring.
constexpr int PartTiles(int tile_rows) { return tile_rows > 8 ? 2 : 1; }  // n8 tiles of them
constexpr int PartBytes(int part_tiles) { return 32 * 4 * part_tiles * int(sizeof(float)); }

template <class F, class T, Blocks kBlocks, Offsets kOffsets, int kN>
__global__ void __launch_bounds__(kThreads, kN == 1 ? 2 : 1)
    gemv_sm80(const __grid_constant__ CudaGemmArgs args, const __grid_constant__ Plan plan,
              const __grid_constant__ FusedRoute fused) {
  using Stage = WeightStage<F, kBlocks, kOffsets != Offsets::kNone>;
  __shared__ RouteTable route;
  __shared__ RowTile listed[kMaxSlots];  // the slots at hand, unless they are in `route`
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t ring = SharedAddress(DynamicShared()) + warp * Stage::kRing;
  asm volatile("" : "+r"(ring));  // keep it: the compiler would rather compute it anew each time
  const int part_tiles = kN == 1 ? 1 : plan.part_tiles;
  static_assert(PartBytes(kN) <= Stage::kRing);
  char* const first_parts = DynamicShared() + kWarps * Stage::kRing;
  char* const unit_ends = first_parts + kWarps * PartBytes(part_tiles);
  const auto part_of = [&](int of_warp, bool of_first_unit) {
    char* const part = of_first_unit ? first_parts + of_warp * PartBytes(part_tiles)
                                     : DynamicShared() + of_warp * Stage::kRing;
    return reinterpret_cast<float4*>(part) + lane;
  };
  char* const shared_x = unit_ends + kWarps * plan.unit_end_bytes;
  const uint32_t unit_end_copy = SharedAddress(unit_ends) + warp * kUnitEndBytes;

  if (args.tiles_are_new) WaitForPrevious();
  if (kN > 1 && fused.enabled) WithdrawRoute(fused);
  // What follows fc2 may read what fc1 found out about the routes, without waiting for that.
  const bool keeps_route = kN > 1 && fused.enabled && !fused.x_is_tokens;
  if (!keeps_route) LetNextStart();
  int slots;
  if (fused.enabled) {
    if constexpr (kN == 1) {
      RouteOneToken(fused, route);
      ClearArrivals(fused);
      slots = fused.route.topk;
    } else {
      if (!ReadRoute(fused, route)) RouteInBlock(fused, route);
      slots = route.slots;
    }
  } else {
    slots = args.tiles != nullptr ? *args.tile_count : int(args.max_tiles);
  }
  const int units = slots * args.row_tiles, k_tiles = (args.k + kTileK - 1) / kTileK;
  int begin, block_end;
  if (kN == 1 || args.tile_rows <= 8) {
    const int share = plan.blocks.Divide(units), more = units - share * int(gridDim.x);
    const int block = int(blockIdx.x);  // the first `more` blocks take one more
    begin = block * share + min(block, more);
    block_end = begin + share + (block < more);
  } else {
    __shared__ Cuts cuts;
    CutByCost(args, plan, slots, cuts, &begin, &block_end);
  }
  while (begin < block_end) {
    const int first_slot = plan.row_tiles.Divide(begin);
    const RowTile* const tiles = fused.enabled ? route.tiles + first_slot : listed;
    if (!fused.enabled) {
      if (threadIdx.x < kMaxSlots && first_slot + int(threadIdx.x) < slots)
        GetRowTile(args, first_slot + threadIdx.x, listed + threadIdx.x);
      __syncthreads();
    }
    // As many slots as the block needs and there is room for.
    const int wanted = min(plan.row_tiles.Divide(block_end - 1) - first_slot + 1, kMaxSlots);
    int used = 1;
    for (int rows = tiles[0].row_count; used < wanted; ++used)
      if ((rows += tiles[used].row_count) > plan.rows) break;
    const int end = min(block_end, (first_slot + used) * args.row_tiles);

    // This warp's k tiles [first, last) of those of units [begin, end), and the unit that they begin in.
    const int total = (end - begin) * k_tiles;
    const int first = warp * total / kWarps, last = (warp + 1) * total / kWarps;
    const int first_unit = plan.k_tiles.Divide(first);  // of the block's
    const int unit_slot = plan.row_tiles.Divide(begin + first_unit);
    const int first_row_tile = begin + first_unit - unit_slot * args.row_tiles;
    const RowTile* const first_tile = tiles + unit_slot - first_slot;
    WeightStream<F, kBlocks, kOffsets != Offsets::kNone> stream(
        args, ring, first_tile, first_row_tile, first - first_unit * k_tiles, last - first, lane);
    for (int i = 0; i < Stage::kDepth - 1; ++i) stream.Load(args);
    for (int unit = begin + threadIdx.x; unit < end; unit += kThreads) {
      const int slot = plan.row_tiles.Divide(unit);
      const int64_t at = (int64_t(tiles[slot - first_slot].expert) * args.row_tiles + unit -
                          slot * args.row_tiles) *
                         kTileRows;
      PrefetchL2(args.row_scales + at);
      if (args.bias != nullptr) PrefetchL2(args.bias + at);
    }
    WaitForPrevious();
    if (keeps_route) LetNextStart();
    StageX<T>(args, plan, tiles, used,
              fused.enabled && fused.x_is_tokens ? route.row_token : nullptr, shared_x);
    CopyAsyncWait<0>();
    if (args.x_quant != ActivationQuant::kNone) QuantizeX<T>(args, plan, tiles, used, shared_x);
    __syncthreads();

    // A unit that this warp's range begins inside of is its to finish, unless an earlier warp's does too.
    const int earlier = warp > 0 ? (warp - 1) * total / kWarps : 0;
    const bool finishes = first > first_unit * k_tiles && earlier <= first_unit * k_tiles;
    UnitEnd first_end{};  // on its way while the warp multiplies
    if (finishes) {
      if (kN == 1 && plan.unit_end_bytes != 0)
        CopyUnitEnd(args, first_tile->expert, first_row_tile, lane, unit_end_copy);
      if constexpr (kN > 1) first_end = LoadUnitEnd(args, first_tile->expert, first_row_tile, lane);
    }

    float sums[kN][4] = {};
    const auto finish = [&](const RowTile& tile, int row_tile, const UnitEnd& unit_end) {
      Finish<T, kN>(args, tile, row_tile, lane, sums, unit_end);
      if constexpr (kN == 1) {
        if (fused.output != nullptr) AddUpExperts<T>(args, fused, route, row_tile, lane);
      }
    };
    int stage = 0;
    for (int position = first; position < last;) {
      // The part of a unit that is this warp's.
      const int unit = plan.k_tiles.Divide(position), unit_first = unit * k_tiles;
      const int unit_last = min(last, unit_first + k_tiles);
      const int all_slot = plan.row_tiles.Divide(begin + unit), slot = all_slot - first_slot;
      const int rows = tiles[slot].row_count;
      int row_before = 0;
      for (int i = 0; i < slot; ++i) row_before += tiles[i].row_count;
      uint32_t x[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int row = n * 8 + lane % 8;
        x[n] = SharedAddress(shared_x) + lane / 8 * 16 + (position - unit_first) * (kTileK * 2) +
               (row_before + (row < rows ? row : 0)) * plan.row_stride;
      }
      const bool whole = position == unit_first && unit_last == unit_first + k_tiles;
      const int row_tile = begin + unit - all_slot * args.row_tiles;
      UnitEnd unit_end{};  // on its way while the warp multiplies
      if (kN > 1 && whole) unit_end = LoadUnitEnd(args, tiles[slot].expert, row_tile, lane);
      const auto multiply = [&]<int kActive>() {
        while (position < unit_last) {
          CopyAsyncWait<Stage::kDepth - 2>();
          __syncwarp();  // the stage has arrived for all lanes, and all have read the one before
          stream.Load(args);
          const auto accumulate = [&](int tile) {
            Accumulate<F, T, kBlocks, kOffsets, kActive>(args, ring + stage, tile, lane, x, sums);
          };
          if (position + Stage::kTiles <= unit_last) {
#pragma unroll
            for (int tile = 0; tile < Stage::kTiles; ++tile) accumulate(tile);
          } else {
            accumulate(0);
          }
          position += Stage::kTiles;
          stage = stage == Stage::kRing - Stage::kBytes ? 0 : stage + Stage::kBytes;
#pragma unroll
          for (int n = 0; n < kN; ++n) x[n] += Stage::kTiles * (kTileK * 2);
        }
      };
      if (kN == 1 || rows <= 8)
        multiply.template operator()<1>();
      else
        multiply.template operator()<kN>();
      position = unit_last;
      if (whole) {
        if (kN == 1) unit_end = LoadUnitEnd(args, tiles[slot].expert, row_tile, lane);
        finish(tiles[slot], row_tile, unit_end);
      } else {
        __syncwarp();  // all lanes have read the ring
        float4* const part = part_of(warp, unit == first_unit);
#pragma unroll
        for (int n = 0; n < kN; ++n)
          if (n < part_tiles)
            part[n * 32] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[n][c] = 0;
    }
    if constexpr (kN == 1) {
      CopyAsyncCommit();
      CopyAsyncWait<0>();
    }
    __syncthreads();

    if (finishes) {
      if constexpr (kN == 1)
        first_end = plan.unit_end_bytes != 0
                        ? ReadUnitEnd(args, lane, unit_end_copy)
                        : LoadUnitEnd(args, first_tile->expert, first_row_tile, lane);
      for (int w = warp - 1; w < kWarps; ++w) {
        const int from = w * total / kWarps, to = (w + 1) * total / kWarps;
        if (from == to) continue;
        const float4* const part = part_of(w, first_unit == plan.k_tiles.Divide(from));
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          if (n >= part_tiles) break;
          const float4 v = part[n * 32];
          sums[n][0] += v.x, sums[n][1] += v.y, sums[n][2] += v.z, sums[n][3] += v.w;
        }
        if (to >= (first_unit + 1) * k_tiles) break;
      }
      finish(*first_tile, first_row_tile, first_end);
    }
    __syncthreads();  // the next round may overwrite
    begin = end;
  }
  WaitForPrevious();  // blocks without work too: this kernel's end says that the one before has ended
}

template <class F>
struct Gemm {
  static constexpr int kMinSm = kFirstSm, kMaxSm = kLastSm;
  static constexpr int kPriority = 40;
  static constexpr bool kQuantizesX = true;
  // The values of a codebook are not exact in 16 bits; the rings have no room for wider codes.
  static constexpr bool kTakesFormat = !F::kCodebook && F::kBits <= 8;
  static constexpr char kLimits[] =
      "few rows: 10 an expert on average; without experts 16, or 256 for up to 512 features";
  static std::vector<DType> DTypes() { return {DType::kFloat16, DType::kBFloat16}; }

  static int64_t MostRows(const GemmProblem& p) {
    const int64_t used = std::max<int64_t>(std::min(p.rows, p.experts), 1);
    if (p.experts > 1) return 10 * used;
    return p.n <= 512 ? 256 : 16;  // weights so small may well be read by several blocks
  }

  static std::string Refuse(const GemmProblem& p) {
    // Beyond that weights are read more than once, or arithmetic outweighs them.
    if (p.rows > MostRows(p)) return Concat(p.rows, " rows; it takes at most ", MostRows(p));
    const int fits = TileRows(p);
    if (PlanOf(p, fits).rows == 0)
      return Concat("rows of ", p.k, " values do not fit into shared memory");
    if (2 * fits < WantedRows(p))  // weights would be read more than twice
      return Concat("only ", fits, fits == 1 ? " row" : " rows", " of ", p.k,
                    " values fit into shared memory, of ", WantedRows(p));
    const int64_t slots = MaxRowTiles(p.rows, p.experts, fits);
    const int64_t units = slots * ((p.n + kTileRows - 1) / kTileRows);
    const int64_t most = kMaxUnits - slots * RoundUnits(p.k);
    if (units > most) return Concat(units, " tiles of rows by weights; it takes at most ", most);
    return RefuseBlockSize(p);
  }

  /// Units that a block could do in the time that it takes to begin with other rows of x.
  static int RoundUnits(int64_t k) { return int(kRoundTiles / ((k + kTileK - 1) / kTileK)); }

  /// Twice what an expert gets on average, but not more than there are tokens: few experts need two tiles.
  static int64_t WantedRows(const GemmProblem& p) {
    const int64_t used = std::max<int64_t>(std::min(p.rows, p.experts), 1);
    const int64_t tokens = p.experts == 1 ? p.rows : p.rows / std::max<int64_t>(p.topk, 1);
    return std::clamp<int64_t>(tokens, 1, p.rows <= 2 * used ? 8 : 16);
  }

  /// So many, or as many as fit.
  static int TileRows(const GemmProblem& p) {
    int rows = int(WantedRows(p));
    while (rows > 1 && PlanOf(p, rows).rows == 0) rows = (rows + 1) / 2;
    return rows;
  }

  static Plan PlanOf(const GemmProblem& p, int tile_rows) {
    const Blocks blocks = p.block_size == 0 ? Blocks::kWide : BlocksOf(p.block_size);
    const Offsets offsets = p.zero_points ? Offsets::kAny : Offsets::kNone;
    const bool large = IsLarge(p.stage, tile_rows);
    return MakePlan(large, tile_rows, FixedBytes(blocks, offsets, large, tile_rows), p.k, p.sm);
  }

  /// Whether the kernel with kN = 2 runs: for all but one token and dense products with up to 8 rows, where two blocks of the other
  /// one fit beside each other.
  static bool IsLarge(GemmStage stage, int tile_rows) {
    return tile_rows > 8 || (stage != GemmStage::kDense && tile_rows > 1);
  }

  static Offsets OffsetsOf(const CudaGemmArgs& args) {
    if (args.zero_offsets == nullptr) return Offsets::kNone;
    return args.integer_offsets ? Offsets::kIntegers : Offsets::kAny;
  }

  static Blocks BlocksOf(int64_t block_size) {
    return block_size == 16 ? Blocks::k16 : block_size == 32 ? Blocks::k32 : Blocks::kWide;
  }

  /// Without rows if not even one slot's fit.
  static Plan MakePlan(bool large, int tile_rows, int fixed_bytes, int64_t k, int sm) {
    Plan plan{};
    plan.row_stride = int((k + kTileK - 1) / kTileK * kTileK * 2 + 16);
    const int64_t room = SharedLimit(sm) - kStaticBytes - fixed_bytes;
    // A block of one token has less than a slot's units, so that two slots are the most. More would keep blocks from fitting beside
    // each other.
    const int64_t wanted = tile_rows == 1 ? 2 : 3 * tile_rows;
    plan.part_tiles = PartTiles(tile_rows);
    // Where they take the room of the last row of x (99 KB of shared memory), unit ends are loaded late.
    for (const int bytes : {large ? 0 : kUnitEndBytes, 0}) {
      plan.unit_end_bytes = bytes;
      plan.rows = int(std::clamp<int64_t>((room - kWarps * bytes) / plan.row_stride, 0, wanted));
      if (plan.rows >= tile_rows) return plan;
    }
    plan.rows = 0;
    return plan;
  }

  static constexpr int kStaticBytes = 4 << 10;  // of shared memory, at most
  static_assert(sizeof(RouteTable) + kMaxSlots * sizeof(RowTile) + sizeof(Cuts) <= kStaticBytes);

  /// Shared memory but for x and unit ends: parts and rings.
  static int FixedBytes(Blocks blocks, Offsets offsets, bool large, int tile_rows) {
    int bytes = 0;
    WithKernel(DType::kFloat16, blocks, offsets, large, [&](auto*, int own) { bytes = own; });
    return bytes + kWarps * PartBytes(PartTiles(tile_rows));
  }

  /// fn(kernel, its shared memory but for parts and x) for the combination; see IsLarge.
  template <class Fn>
  static void WithKernel(DType dtype, Blocks blocks, Offsets offsets, bool large, Fn&& fn) {
    const auto with_rows = [&]<class T, Blocks kBlocks, Offsets kOffsets>() {
      const auto with_n = [&]<int kN>() {
        fn(&gemv_sm80<F, T, kBlocks, kOffsets, kN>,
           kWarps * WeightStage<F, kBlocks, kOffsets != Offsets::kNone>::kRing);
      };
      large ? with_n.template operator()<2>() : with_n.template operator()<1>();
    };
    const auto with_blocks = [&]<class T, Blocks kBlocks>() {
      if constexpr (F::kZeroPoints) {
        if (offsets == Offsets::kIntegers)
          return with_rows.template operator()<T, kBlocks, Offsets::kIntegers>();
        if (offsets == Offsets::kAny)
          return with_rows.template operator()<T, kBlocks, Offsets::kAny>();
      }
      with_rows.template operator()<T, kBlocks, Offsets::kNone>();
    };
    const auto with_type = [&]<class T>() {
      if (blocks == Blocks::k16)
        with_blocks.template operator()<T, Blocks::k16>();
      else if (blocks == Blocks::k32)
        with_blocks.template operator()<T, Blocks::k32>();
      else
        with_blocks.template operator()<T, Blocks::kWide>();
    };
    dtype == DType::kFloat16 ? with_type.template operator()<__half>()
                             : with_type.template operator()<__nv_bfloat16>();
  }

  static void Prepare(DType dtype, int sm) {
    for (Blocks blocks : {Blocks::k16, Blocks::k32, Blocks::kWide})
      for (Offsets offsets : {Offsets::kNone, Offsets::kIntegers, Offsets::kAny})
        for (bool large : {false, true})
          WithKernel(dtype, blocks, offsets, large, [&](auto* kernel, int) {
            PrepareKernel("gemv_sm80", reinterpret_cast<const void*>(kernel),
                          SharedLimit(sm) - kStaticBytes);
          });
  }

  static void Launch(const CudaGemmArgs& args, cudaStream_t stream) {
    LaunchRouted(args, FusedRoute{}, stream);
  }

  static void LaunchRouted(const CudaGemmArgs& args, const FusedRoute& fused, cudaStream_t stream) {
    const Blocks scales = BlocksOf(int64_t(1) << args.block_shift);
    const Offsets offsets = OffsetsOf(args);
    const bool large = IsLarge(args.stage, args.tile_rows);
    QMOE_REQUIRE(!fused.enabled || large == (fused.route.tokens > 1), "gemv_sm80 cannot route ",
                 fused.route.tokens, " tokens in tiles of ", args.tile_rows, " rows");
    const int fixed_bytes = FixedBytes(scales, offsets, large, args.tile_rows);
    Plan plan = MakePlan(large, args.tile_rows, fixed_bytes, args.k, args.sm);
    const int64_t blocks = std::min<int64_t>(args.multiprocessors, args.max_tiles * args.row_tiles);
    const int k_tiles = (args.k + kTileK - 1) / kTileK;
    plan.k_tiles = FastDivisor(k_tiles), plan.x_chunks = FastDivisor(k_tiles * 8);
    plan.round_cost = RoundUnits(args.k) * int(kFewCost);
    plan.row_tiles = FastDivisor(args.row_tiles), plan.blocks = FastDivisor(uint32_t(blocks));
    WithKernel(args.dtype, scales, offsets, large, [&](auto* kernel, int) {
      const int shared_bytes =
          fixed_bytes + kWarps * plan.unit_end_bytes + plan.rows * plan.row_stride;
      ::qmoe_plugin::Launch("gemv_sm80", kernel, blocks, kThreads, shared_bytes, args.overlap,
                            stream, args, plan, fused);
    });
  }
};

}  // namespace qmoe_plugin::gemv_sm80
