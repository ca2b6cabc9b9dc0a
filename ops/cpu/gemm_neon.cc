// GEMM and element-wise functions on AArch64's Advanced SIMD (NEON): 4 lanes, four vectors a panel.
//
// A look-up (TBL) works on bytes, and a panel's dword has codes in each of its bytes. So one look-up
// finds a byte of the numbers of four k, and the compiler finds that four neighbouring Decode share
// it.
#include <arm_neon.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_neon.inc"

/// Bytes 0 and 2 of each lane of a and b as (a0 b0 a2 b2), or with kOdd (a1 b1 a3 b3).
template <bool kOdd>
QMOE_SIMD uint16x8_t Pairs(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u16_u8(kOdd ? vtrn2q_u8(a, b) : vtrn1q_u8(a, b));
}

/// Lower 16 bits of each lane, or with kUpper the upper ones.
template <bool kUpper>
QMOE_SIMD uint16x4_t Halves(uint32x4_t x) {
  if constexpr (kUpper) return vshrn_n_u32(x, 16);
  return vmovn_u32(x);
}

/// Codes of 2 or 4 bits of any format; with kShort the numbers are bfloat16 (all integers and
/// halves that there are), whose lower two bytes are zero.
template <int Bits, bool kShort>
struct TableDecoder {
  static constexpr int kBits = Bits;
  explicit TableDecoder(const float* table) {
    const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
    for (int b = 0; b < 4; ++b) values[b] = bytes.val[b];
  }
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    constexpr int kByte = kShift / 8, kInByte = kShift % 8;
    // Of 2 bits the table repeats, so that the next code need not be masked.
    uint8x16_t index = vreinterpretq_u8_s32(codes);
    if constexpr (kInByte > 0) index = vshrq_n_u8(index, kInByte);
    if constexpr (kInByte < 4) index = vandq_u8(index, vdupq_n_u8(15));
    const uint16x8_t high =
        Pairs<kByte % 2>(vqtbl1q_u8(values[2], index), vqtbl1q_u8(values[3], index));
    if constexpr (kShort) {
      const uint32x4_t both = vreinterpretq_u32_u16(high);
      return vreinterpretq_f32_u32(kByte < 2 ? vshlq_n_u32(both, 16)
                                             : vandq_u32(both, vdupq_n_u32(0xffff0000)));
    } else {
      const uint16x8_t low =
          Pairs<kByte % 2>(vqtbl1q_u8(values[0], index), vqtbl1q_u8(values[1], index));
      return vreinterpretq_f32_u16(kByte < 2 ? vtrn1q_u16(low, high) : vtrn2q_u16(low, high));
    }
  }
  uint8x16_t values[4];  // [4][16]: byte b of number i
};

/// 8-bit codes of any format, by a table look-up in memory.
struct ByteTableDecoder {
  static constexpr int kBits = 8;
  explicit ByteTableDecoder(const float* table) : values(table) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const uint8x16_t index = vreinterpretq_u8_s32(codes);
    constexpr int kByte = kShift / 8;
    return Vec::F{values[index[kByte]], values[index[4 + kByte]], values[index[8 + kByte]],
                  values[index[12 + kByte]]};
  }
  const float* values;
};

/// 8-bit codes that mean code - 128: made two's complement, then sign-extended.
struct SignedDecoder {
  static constexpr int kBits = 8;
  explicit SignedDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) {
    return Vec::Xor(codes, Vec::SetI(int(0x80808080)));
  }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(codes, 24 - kShift), 24));
  }
};

/// e4m3: with the exponent moved to its place, a float16 of 2^-8 times the value; subnormals too.
struct E4M3Decoder {
  static constexpr int kBits = 8;
  explicit E4M3Decoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const uint16x8_t both = vreinterpretq_u16_s32(codes);  // two codes in each
    const uint16x8_t code = kShift % 16 ? vshrq_n_u16(both, 8) : vandq_u16(both, vdupq_n_u16(255));
    const uint16x8_t sign = vandq_u16(code, vdupq_n_u16(128));
    // Shifted by 7 the sign is one bit too low; added to itself it moves up.
    const uint16x8_t half = vshlq_n_u16(vaddq_u16(code, sign), 7);
    const uint16x4_t mine = Halves<kShift / 16>(vreinterpretq_u32_u16(half));
    return vmulq_f32(vcvt_f32_f16(vreinterpret_f16_u16(mine)), vdupq_n_f32(256.0f));
  }
};

/// Plain codes of 16 or 32 bits.
struct HalfDecoder {
  static constexpr int kBits = 16;
  explicit HalfDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const uint16x4_t mine = Halves<kShift / 16>(vreinterpretq_u32_s32(codes));
    return vcvt_f32_f16(vreinterpret_f16_u16(mine));
  }
};

struct BFloat16Decoder {
  static constexpr int kBits = 16;
  explicit BFloat16Decoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return vreinterpretq_f32_s32(kShift ? vandq_s32(codes, vdupq_n_s32(int(0xffff0000)))
                                        : vshlq_n_s32(codes, 16));
  }
};

struct FloatDecoder {
  static constexpr int kBits = 32;
  explicit FloatDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return vreinterpretq_f32_s32(codes);
  }
};

/// Up to 16 running sums, which leaves 16 registers for codes, the parts of numbers that several k
/// share, and the table. Totals are spilled, but only once a block.
inline constexpr int kTileRows[] = {1, 2, 3, 4, 6, 8};
inline constexpr int kMaxRows = 8;

constexpr int VectorsInFlight(int rows) { return rows <= 2 ? 4 : 2; }

// In this order, which is that of use:
#include "ops/cpu/elementwise.inc"
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_tile.inc"
//
#include "ops/cpu/gemm_rows.inc"

GemmFunction SelectGemm(int bits, Codes codes) {
  if (codes == Codes::kFloat16) return Gemm<HalfDecoder>;
  if (codes == Codes::kBFloat16) return Gemm<BFloat16Decoder>;
  if (codes == Codes::kFloat32) return Gemm<FloatDecoder>;
  const bool is_short = codes == Codes::kSigned || codes == Codes::kHalves;
  if (bits == 2) return is_short ? Gemm<TableDecoder<2, true>> : Gemm<TableDecoder<2, false>>;
  if (bits == 4) return is_short ? Gemm<TableDecoder<4, true>> : Gemm<TableDecoder<4, false>>;
  if (codes == Codes::kE4M3) return Gemm<E4M3Decoder>;
  return codes == Codes::kSigned ? Gemm<SignedDecoder> : Gemm<ByteTableDecoder>;
}

}  // namespace

const CpuIsa kCpuNeon = {.name = "neon",
                         .gemm = SelectGemm,
                         .activate = Activate,
                         .add_scaled = AddScaled,
                         .to_float = ToFloat,
                         .from_float = FromFloat};

}  // namespace qmoe_plugin
