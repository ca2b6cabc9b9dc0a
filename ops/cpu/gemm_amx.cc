// GEMM on the tiles of AMX-BF16: tdpbf16ps, 8192 products an instruction. A single row, which would
// leave tiles mostly empty, is multiplied on AVX-512.

// GCC 12's own intrinsics pass deliberately undefined vectors on; it warns about that in our code.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_avx512.inc"
//
#include "ops/cpu/bf16_decoders.inc"

inline constexpr int kHighHalf = int(0xffff0000);  // of a dword

/// An arithmetic of gemm_blocks.inc: activations as a sum of bfloat16 numbers, for tiles. One is
/// bfloat16(x). Three are all of a float32: its 24 bits are cut, not rounded, into three times 8.
/// (Two would err by up to 2^-16, and by 2.4e-6 on average, which the exact kernels must not.)
///
/// A single row multiplies bfloat16(x) by the operations of a tile, in their order, to the same bits;
/// but float32 as it is, once instead of three times: decode is fast at the price of other bits than
/// a batch has.
template <class Decoder, int K, int Pieces>
struct PieceBlocks : Decoder {
  using Decoder::Decoder;
  static constexpr int kK = K, kStepK = 4, kPieces = Pieces;
  static constexpr bool kWhole = Pieces > 1;

  struct Block {
    // x * kUnit, the largest piece first; of each four, the two in the middle are swapped.
    uint16_t x[Pieces][K];
    float whole[kWhole ? K : 1];  // x * kUnit in order, for a single row
    float sum;                    // of x
    int32_t pieces;               // those behind are all zero
  };

  struct Acc {
    Vec::F even, odd;
  };

  QMOE_SIMD static Acc Start(const Block&) { return {Vec::Zero(), Vec::Zero()}; }
  QMOE_SIMD static Vec::F Sum(const Acc& acc) { return Vec::Add(acc.even, acc.odd); }

  QMOE_SIMD static Vec::F Scale(Vec::F sum, const Block&) { return sum; }

  /// Codes of k [4 * J, 4 * J + 4) of a block.
  template <int J>
  QMOE_SIMD void DecodeStep(const uint8_t* codes, Vec::I (&w)[2]) const {
    constexpr int kBits = Decoder::kBits, kDword = J * kBits / 8, kShift = J * kBits % 8;
    this->template Decode<kShift>(Vec::LoadI(codes + kDword * 64), w);
  }

  template <int J, int C, int M>
  QMOE_SIMD void Step(const uint8_t* const (&codes)[C], const Block* const (&x)[M], int64_t at,
                      Acc (&acc)[M][C]) const {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      Vec::I w[2];
      DecodeStep<J>(codes[c], w);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          Acc& sums = acc[m][c];
          if constexpr (kWhole) {
            const float* const k = x[m][at].whole + 4 * J + i;
            sums.even = Vec::Fma(LowerOf(w[i]), Vec::Set(k[0]), sums.even);
            sums.odd = Vec::Fma(UpperOf(w[i]), Vec::Set(k[2]), sums.odd);
          } else {
            int32_t pair;
            __builtin_memcpy(&pair, x[m][at].x[0] + 4 * J + 2 * i, sizeof pair);
            const Vec::I pairs = Vec::SetI(pair);
            sums.even = Vec::Fma(LowerOf(w[i]), LowerOf(pairs), sums.even);
            sums.odd = Vec::Fma(UpperOf(w[i]), UpperOf(pairs), sums.odd);
          }
        }
    }
  }

  /// The lower or upper bfloat16 numbers of dwords.
  QMOE_SIMD static Vec::F LowerOf(Vec::I pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  }
  QMOE_SIMD static Vec::F UpperOf(Vec::I pairs) {
    return _mm512_castsi512_ps(Vec::And(pairs, Vec::SetI(kHighHalf)));
  }

  static void Fill(const float* x, Block& block) {
    Vec::F sum = Vec::Zero();
    __mmask16 used[Pieces] = {};
    for (int i = 0; i < K; i += Vec::kLanes) {
      Vec::F rest = Vec::Mul(Vec::Load(x + i), Vec::Set(Decoder::kUnit));
      if constexpr (kWhole) Vec::Store(block.whole + i, rest);
      Vec::I pieces[Pieces];
      if constexpr (Pieces == 1) {
        uint16_t rounded[Vec::kLanes];
        Vec::StoreBFloat16(rounded, rest);
        rest = Vec::LoadBFloat16(rounded);
        pieces[0] = _mm512_castps_si512(rest);
      } else {
        Cut(rest, pieces);
      }
      sum = Vec::Add(sum, rest);
      for (int p = 0; p < Pieces; ++p) {
        used[p] |= _mm512_test_epi32_mask(pieces[p], Vec::SetI(0x7fffffff));
        StorePiece(pieces[p], block.x[p] + i);
      }
    }
    block.sum = _mm512_reduce_add_ps(sum) / Decoder::kUnit;
    block.pieces = Pieces;
    while (block.pieces > 1 && used[block.pieces - 1] == 0) --block.pieces;
  }

  /// Cuts numbers into pieces, the upper halves of dwords. Infinities and NaN have one only.
  QMOE_SIMD static void Cut(Vec::F rest, Vec::I (&pieces)[Pieces]) {
    const __mmask16 finite =
        _mm512_cmp_ps_mask(Vec::Abs(rest), Vec::Set(__builtin_inff()), _CMP_LT_OQ);
    const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
    for (int p = 0; p < Pieces; ++p) {
      const Vec::I bits = _mm512_castps_si512(rest);
      pieces[p] = Vec::And(bits, Vec::SetI(kHighHalf));
      if (p == 0)  // a NaN's upper half must not be that of infinity
        pieces[p] = _mm512_mask_or_epi32(pieces[p], nan, pieces[p], Vec::SetI(0x400000));
      rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(pieces[p]));
    }
  }

  /// Upper halves of 16 dwords, in the decoders' order.
  QMOE_SIMD static void StorePiece(Vec::I piece, uint16_t* out) {
    const __m256i order = _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(piece, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutexvar_epi16(order, halves));
  }
};

/// A single row is multiplied without tiles: a prototype was twice as fast so, and a little slower
/// with two.
inline constexpr int kTileRows[] = {1};
inline constexpr int kMaxRows = 1;

constexpr int VectorsInFlight(int) { return 4; }

/// What ldtilecfg loads: rows of the eight tiles, and bytes of a row.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// In this order, which is that of use:
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_blocks.inc"
//
#include "ops/cpu/gemm_rows.inc"
//
#include "ops/cpu/amx_tile.inc"
//
#include "ops/cpu/gemm_amx_tiles.inc"

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
template <class T>
void GemmOfAnyRows(const GemmArgs& args) {
  const FlushDenormals flush;
  if (args.rows <= kMaxRows) return Gemm<T>(args);
  for (int64_t first = 0; first < args.rows; first += kGroupRows)
    TileGemm<T>(args, first, args.rows - first < kGroupRows ? args.rows - first : kGroupRows).Run();
}

template <class T>
GemmKernel AmxKernel() {
  return {GemmOfAnyRows<T>, BlocksGemm<T>().bytes_of_32, StoreBlocks<T>, T::kWhole};
}

template <class Decoder, int Pieces>
GemmKernel Select(int block) {
  return block == 32 ? AmxKernel<PieceBlocks<Decoder, 32, Pieces>>()
                     : AmxKernel<PieceBlocks<Decoder, 16, Pieces>>();
}

template <int Pieces>
GemmKernel Select(int bits, Codes codes, int block) {
  if (bits == 2) return Select<TableDecoder<2>, Pieces>(block);
  if (bits == 4) return Select<TableDecoder<4>, Pieces>(block);
  if (bits == 8 && codes == Codes::kSigned) return Select<SignedDecoder, Pieces>(block);
  if (bits == 8 && codes == Codes::kE4M3) return Select<E4M3Decoder, Pieces>(block);
  return {};
}

}  // namespace

GemmKernel AmxGemm(int bits, Codes codes, int block) {
  if (codes == Codes::kTable) return {};  // any numbers, which bfloat16 may have to round
  return Select<3>(bits, codes, block);
}

GemmKernel AmxBf16Gemm(int bits, Codes codes, int block) { return Select<1>(bits, codes, block); }

}  // namespace qmoe_plugin
