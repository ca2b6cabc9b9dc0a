// GEMM on the tiles of AMX-BF16: tdpbf16ps, 8192 products an instruction. For many rows; with few,
// tiles would be mostly empty.

// GCC 12's own intrinsics pass deliberately undefined vectors on; it warns about that in our code.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"
#include "ops/cpu/row_tiles.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

using cpu::kGroupRows;
using cpu::kGroupTiles;
using cpu::kTileRows;
using cpu::StoredRow;

#include "ops/cpu/vec_avx512.inc"
//
#include "ops/cpu/bf16_decoders.inc"
//
#include "ops/cpu/gemm_scales.inc"

inline constexpr int kHighHalf = int(0xffff0000);  // of a dword

/// What ldtilecfg loads: rows of the eight tiles, and bytes of a row.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// In this order, which is that of use:
#include "ops/cpu/amx_tile.inc"
//
#include "ops/cpu/amx_operands.inc"
//
#include "ops/cpu/gemm_amx_exact.inc"
//
#include "ops/cpu/gemm_amx_bf16.inc"

/// Denormals are zero from here to its end, as they are in tiles.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  const uint32_t saved_;
};

/// The GemmFunction.
template <class Tiles>
void GemmOfGroups(const GemmArgs& args) {
  const FlushDenormals flush;
  for (int64_t first = 0; first < args.rows; first += kGroupRows)
    Tiles(args, first, args.rows - first < kGroupRows ? args.rows - first : kGroupRows).Run();
}

/// The kernel of a class that multiplies a group of rows, which names its operands.
template <class Tiles>
GemmKernel KernelOf() {
  using Rows = typename Tiles::Rows;
  constexpr int64_t kBlocks = 32 / Rows::kK;
  return {.gemm = GemmOfGroups<Tiles>,
          .bytes_of_32 = kBlocks * Rows::kRowBytes,
          .store = StoreInTiles<Rows, typename Tiles::Weights>,
          .in_tiles = true,
          .tile_bytes_of_32 = kBlocks * Rows::kTileBytes};
}

}  // namespace

GemmKernel AmxGemm(int bits, Codes codes, int block) {
  if (codes == Codes::kTable) return {};  // any numbers, which bfloat16 may have to round
  return WithDecoder(bits, codes, [&]<class Decoder>() {
    return block == 32 ? KernelOf<ExactTiles<Decoder, 32>>() : KernelOf<ExactTiles<Decoder, 16>>();
  });
}

GemmKernel AmxBf16Gemm(int bits, Codes codes, int) {
  return WithDecoder(bits, codes, []<class Decoder>() { return KernelOf<Bf16Tiles<Decoder>>(); });
}

}  // namespace qmoe_plugin
