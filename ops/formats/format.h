// What a quantised weight format is, and how one is added.
//
// A weight is w = (centered(code) + zero_offset) * scale, where centered(code) = Decode(code) -
// kDefaultZeroPoint and zero_offset = kDefaultZeroPoint - zero_point (0 when the model gives no
// zero points). A format is one header ops/formats/<name>.h with a struct of the same name in
// namespace qmoe_plugin::formats:
//
//   struct int4 : FormatBase<int4, 4> {                  // bits a code: 2, 4 or 8
//     static constexpr char kName[] = "int4";
//     static constexpr float kDefaultZeroPoint = 8;      // 0 for formats whose codes are floats
//     static constexpr bool kZeroPoints = true;          // may a model give zero points?
//     QMOE_HOST_DEVICE static float Decode(uint32_t code) { return float(code); }
//   };
//
// That is all a format must say: the build finds the file, registers the format and instantiates
// every generic kernel for it. Its scales are then floats, a row or a block of any size; kScales,
// kBlockSize and kSquareBlocks of FormatBase say otherwise.
//
// A format that wants speed also says how the 8 codes of one MMA A
// fragment lie in memory (EncodeFragment) and how a GPU turns them into 8 numbers
// (DequantFragment); FormatBase has plain versions of both.
//
// Unquantised weights are formats, too: float16, bfloat16 and float32, whose codes of 16 or 32 bits
// are the numbers themselves (PlainFormat). They have no scales.
//
// One fragment is what one lane feeds to mma.m16n8k16 as operand A. With g = lane / 4 and t = lane
// % 4, its codes are, in register order: (g, 2t) (g, 2t+1) | (g+8, 2t) (g+8, 2t+1) | (g, 2t+8) (g,
// 2t+9) | (g+8, 2t+8) (g+8, 2t+9) as (row of the tile, k). It takes `bits` bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "ops/dtype.h"

#if defined(__CUDACC__)
#define QMOE_HOST_DEVICE __host__ __device__
#define QMOE_DEVICE __device__
#else
#define QMOE_HOST_DEVICE
#define QMOE_DEVICE
#endif

namespace qmoe_plugin {

/// The types that a format's scales may have, and with it whether each expert has a global scale, a
/// float32 factor on all of its weights.
enum class ScaleKind {
  kFloat,  // float32, float16 or bfloat16; no global scale
  kE8M0,   // float8e8m0, or uint8 with the same bytes; with a global scale
  kE4M3,   // float8e4m3fn; with a global scale
  kAny,    // any of these types but uint8; a global scale may be given
};

/// What the host knows of a format at run time. Made from the header's struct by `DescribeFormat`.
struct Format {
  const char* name;
  int bits;                  // 2, 4 or 8 bits a code; 16 or 32 of plain formats
  DType plain_type;          // the float type that the codes are; kUndefined if quantised
  float default_zero_point;  // subtracted from a decoded code when the model gives no zero points
  bool zero_points;          // whether a model may give zero points
  bool is_float;             // codes are floats, not integers
  bool has_nan;              // some code is not a number
  bool codebook;             // the model gives the values of the codes; those below are 0
  bool affine;  // GPUs scale and center codes at once, where PackedHeader::kCoarseScales
  ScaleKind scales;
  int64_t block_size;   // the one block size that it has; 0 = the model says, and per channel
  bool square_blocks;   // blocks are as many rows high; per channel is then per expert
  float centered[256];  // Decode(code) - default_zero_point for each of the 2^bits codes; not of
                        // plain formats
  /// Lays out the 8 codes of one fragment (see the top of this file), code_bytes() each, in `bits`
  /// bytes.
  void (*encode_fragment)(const uint8_t* codes, uint8_t* bytes);

  bool plain() const { return plain_type != DType::kUndefined; }
  /// Bytes of a code where each has its own: what RowReader delivers and layouts take.
  int code_bytes() const { return bits > 8 ? bits / 8 : 1; }
};

namespace formats {

/// Defaults for a format: the codes of a fragment lie in register order, lowest bits first, and are
/// decoded one by one.
template <class Derived, int Bits>
struct FormatBase {
  static_assert(Bits == 2 || Bits == 4 || Bits == 8);
  static constexpr int kBits = Bits;
  static constexpr DType kPlainType = DType::kUndefined;
  static constexpr uint32_t kCodeMask = (1u << Bits) - 1;
  /// Whether the model gives the values of the codes (Projection::codebook) instead of Decode. Such a
  /// format has 4 bits and keeps the fragments of FormatBase.
  static constexpr bool kCodebook = false;
  static constexpr bool kAffine = false;  // see int4
  /// See Format::scales, block_size and square_blocks.
  static constexpr ScaleKind kScales = ScaleKind::kFloat;
  static constexpr int64_t kBlockSize = 0;
  static constexpr bool kSquareBlocks = false;
  /// 32-bit words that hold one fragment (a 2-bit fragment fills half a word, the low half).
  static constexpr int kFragmentWords = Bits < 4 ? 1 : Bits / 4;

  QMOE_HOST_DEVICE static float Centered(uint32_t code) {
    return Derived::Decode(code) - Derived::kDefaultZeroPoint;
  }

  static void EncodeFragment(const uint8_t* codes, uint8_t* bytes) {
    for (int i = 0; i < Bits; ++i) bytes[i] = 0;
    for (int i = 0; i < 8; ++i) bytes[i * Bits / 8] |= uint8_t(codes[i] << (i * Bits % 8));
  }

  /// Centered values of one fragment. T2 is float2, half2 or __nv_bfloat162; `words` has
  /// kFragmentWords words.
  template <class T2>
  QMOE_DEVICE static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      const int bit = 2 * i * Bits;
      const uint32_t pair = words[bit / 32] >> (bit % 32);
      a[i] = T2{Centered(pair & kCodeMask), Centered((pair >> Bits) & kCodeMask)};
    }
  }
};

/// A format whose codes are numbers of a float type. Fragments lie in register order, and need no
/// decoding but a conversion: DequantFragment is the format's own.
template <class Derived, DType kType>
struct PlainFormat {
  static_assert(IsFloat(kType));
  static constexpr DType kPlainType = kType;
  static constexpr int kBits = 8 * int(SizeOf(kType));
  static constexpr int kFragmentWords = kBits / 4;
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr bool kCodebook = false;
  static constexpr bool kAffine = false;
  static constexpr ScaleKind kScales = ScaleKind::kFloat;  // of which it has none
  static constexpr int64_t kBlockSize = 0;
  static constexpr bool kSquareBlocks = false;

  static void EncodeFragment(const uint8_t* codes, uint8_t* bytes) {
    std::memcpy(bytes, codes, kBits);
  }
};

}  // namespace formats

/// The run-time description of format struct F.
template <class F>
Format DescribeFormat() {
  static_assert(sizeof F::kName <= 13, "a format's name has at most 12 characters");
  static_assert(!F::kCodebook || F::kBits == 4, "a format with a codebook has 4 bits");
  static_assert(!F::kSquareBlocks || F::kScales == ScaleKind::kFloat,
                "square blocks have float scales");
  Format format{};
  format.name = F::kName;
  format.bits = F::kBits;
  format.plain_type = F::kPlainType;
  format.default_zero_point = F::kDefaultZeroPoint;
  format.zero_points = F::kZeroPoints;
  format.codebook = F::kCodebook;
  format.affine = F::kAffine;
  format.scales = F::kScales;
  format.block_size = F::kBlockSize;
  format.square_blocks = F::kSquareBlocks;
  format.encode_fragment = &F::EncodeFragment;
  if constexpr (F::kPlainType != DType::kUndefined) {
    format.has_nan = format.is_float = true;
  } else {
    for (uint32_t code = 0; code < (1u << F::kBits); ++code) {
      const float value = format.centered[code] = F::Centered(code);
      format.has_nan |= value != value;
      format.is_float |= F::Decode(code) != float(code);
    }
  }
  return format;
}

/// All registered formats, by name.
const std::vector<const Format*>& Formats();

/// The format called `name`, or null.
const Format* FindFormat(std::string_view name);

/// The format called `name`; throws an Error that lists the known ones.
const Format& GetFormat(std::string_view name);

/// Called at load time by the generated translation units of the format, and of its CUDA kernels:
/// which comes first is undefined, so registering a name again is harmless.
bool RegisterFormat(Format format);

}  // namespace qmoe_plugin
