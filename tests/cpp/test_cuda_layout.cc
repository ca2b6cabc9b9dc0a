// Walks packed tiles the way a warp does, and decodes fragments with the integer steps that a GPU
// uses.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ops/common/float_codes.h"
#include "ops/dtype.h"
#include "ops/formats/format.h"
#include "ops/formats/fp8_e4m3.h"
#include "ops/formats/int4.h"
#include "ops/formats/int8.h"
#include "ops/formats/mxfp4.h"
#include "ops/formats/nvfp4.h"
#include "ops/gemm/layout.h"
#include "ops/pack.h"

namespace qmoe_plugin {
namespace {

int failures = 0;

#define EXPECT(condition, ...)                                      \
  do {                                                              \
    if (!(condition)) {                                             \
      if (++failures <= 20) {                                       \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                   \
        std::printf("\n");                                          \
      }                                                             \
    }                                                               \
  } while (false)

constexpr int64_t kPadded = 192;  // three tiles along k

/// Codes [16, kPadded], of a byte each or, above 8 bits, of bits / 8.
std::vector<uint8_t> RandomCodes(int bits) {
  std::mt19937 random(bits);
  std::vector<uint8_t> codes(16 * kPadded * (bits > 8 ? bits / 8 : 1));
  for (uint8_t& code : codes) code = uint8_t(random() & ((1u << std::min(bits, 8)) - 1));
  return codes;
}

std::vector<uint8_t> EncodeTile(const Format& format, const std::vector<uint8_t>& codes) {
  std::vector<uint8_t> bytes(size_t(kPadded / kTileK) * TileBytes(format.bits), 0xcc);
  GetTileLayout(Layout::kCudaTile16x64).encode_tile(format, codes.data(), kPadded, bytes.data());
  return bytes;
}

/// The 8 codes that mma.m16n8k16 expects of a lane as operand A, by the figure in the PTX manual.
void ExpectedFragment(const std::vector<uint8_t>& codes, int64_t k, int lane, uint8_t* fragment,
                      int code_bytes = 1) {
  const int group = lane >> 2, thread = lane % 4;
  for (int i = 0; i < 8; ++i) {
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    const int column = thread * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    EXPECT(row == FragmentRow(lane, i) && column == FragmentK(lane, i), "lane %d code %d", lane, i);
    std::memcpy(fragment + i * code_bytes, &codes[(row * kPadded + k + column) * code_bytes],
                size_t(code_bytes));
  }
}

/// Every fragment of every lane lies where the layout says, and nothing overlaps.
void TestPlaces(const Format& format) {
  const std::vector<uint8_t> codes = RandomCodes(format.bits), bytes = EncodeTile(format, codes);
  std::vector<int> owners(bytes.size(), 0);
  for (int64_t tile = 0; tile < kPadded / kTileK; ++tile)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < kFragmentsPerTile; ++j) {
        uint8_t fragment[32], expected[32];
        ExpectedFragment(codes, tile * kTileK + 16 * j, lane, fragment, format.code_bytes());
        format.encode_fragment(fragment, expected);
        for (int b = 0; b < format.bits; ++b) {
          const size_t at =
              size_t(tile) * TileBytes(format.bits) + FragmentOffset(format.bits, lane, j, b);
          EXPECT(bytes[at] == expected[b], "%s: tile %d lane %d fragment %d byte %d", format.name,
                 int(tile), lane, j, b);
          ++owners[at];
        }
      }
  for (size_t i = 0; i < owners.size(); ++i)
    EXPECT(owners[i] == 1, "%s: byte %zu has %d owners", format.name, i, owners[i]);
}

/// Each code of a fragment can be told apart from each other one at its place.
void TestFragmentKeepsCodes(const Format& format) {
  for (int place = 0; place < 8; ++place) {
    std::vector<uint64_t> seen;
    for (int code = 0; code < 1 << format.bits; ++code) {
      uint8_t codes[8] = {}, bytes[8] = {};
      codes[place] = uint8_t(code);
      format.encode_fragment(codes, bytes);
      uint64_t word;
      std::memcpy(&word, bytes, sizeof word);
      for (uint64_t other : seen) EXPECT(word != other, "%s: code %d", format.name, code);
      seen.push_back(word);
    }
  }
}

float Half(uint32_t bits, int half) { return HalfToFloat(uint16_t(bits >> 16 * half)); }
float BFloat(uint32_t bits, int half) { return BFloat16ToFloat(uint16_t(bits >> 16 * half)); }

/// Values of one int4 fragment by DequantFragment's steps, for half2 and bfloat162.
void TestInt4(const Format& format) {
  const std::vector<uint8_t> codes = RandomCodes(4), bytes = EncodeTile(format, codes);
  for (int64_t tile = 0; tile < kPadded / kTileK; ++tile)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < kFragmentsPerTile; ++j) {
        uint8_t fragment[8];
        ExpectedFragment(codes, tile * kTileK + 16 * j, lane, fragment);
        uint32_t word;
        std::memcpy(&word, &bytes[size_t(tile) * TileBytes(4) + FragmentOffset(4, lane, j)], 4);
        for (int i = 0; i < 8; ++i) {
          const float expected = format.centered[fragment[i]];
          const float biased = Half(formats::int4::BiasedHalf2(word, i / 2), i % 2);
          const float half = i < 4 ? biased - 1032.0f : biased * 0.0625f - 72.0f;
          const float bfloat = BFloat(formats::int4::BiasedBFloat162(word, i / 2), i % 2) - 136.0f;
          const float low = i < 4 ? 1 : 1.0f / 16;
          const float small = Half(formats::int4::SubnormalHalf2(word, i / 2), i % 2);
          const float tiny = BFloat(formats::int4::SubnormalBFloat162(word, i / 2), i % 2);
          EXPECT(small * 0x1p21f * low == fragment[i], "lane %d code %d: %g", lane, i, small);
          EXPECT(tiny * 0x1p127f * 64 * low == fragment[i], "lane %d code %d: %g", lane, i, tiny);
          EXPECT(half == expected, "lane %d code %d: %g not %g", lane, i, half, expected);
          EXPECT(bfloat == expected, "lane %d code %d: %g not %g", lane, i, bfloat, expected);
        }
      }
}

void TestInt8(const Format& format) {
  const std::vector<uint8_t> codes = RandomCodes(8), bytes = EncodeTile(format, codes);
  for (int64_t tile = 0; tile < kPadded / kTileK; ++tile)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < kFragmentsPerTile; ++j) {
        uint8_t fragment[8];
        ExpectedFragment(codes, tile * kTileK + 16 * j, lane, fragment);
        uint32_t words[2];
        std::memcpy(words, &bytes[size_t(tile) * TileBytes(8) + FragmentOffset(8, lane, j)], 8);
        for (int i = 0; i < 8; ++i) {
          const float expected = format.centered[fragment[i]];
          const float half = Half(formats::int8::BiasedHalf2(words, i / 2), i % 2) - 1152.0f;
          const float single = std::bit_cast<float>(formats::int8::BiasedFloat(words, i));
          EXPECT(half == expected, "lane %d code %d: %g not %g", lane, i, half, expected);
          EXPECT(single - 8388736.0f == expected, "lane %d code %d", lane, i);
          EXPECT(BFloat16ToFloat(FloatToBFloat16(expected)) == expected, "code %d", fragment[i]);
        }
      }
}

/// check(codes) with each code at each of the 8 places of a fragment, the others being random.
template <class Check>
void ForEachCode(int bits, const Check& check) {
  std::mt19937 random(5);
  for (int place = 0; place < 8; ++place)
    for (uint32_t code = 0; code < 1u << bits; ++code) {
      uint8_t codes[8];
      for (uint8_t& other : codes) other = uint8_t(random() & ((1u << bits) - 1));
      codes[place] = uint8_t(code);
      check(codes);
    }
}

/// Floats whose fragments decode to 16 bits times a power of two: these must be exact, and so must be
/// the multiplication that follows (in range and on its grid), for all codes. scaled(words, place):
/// the value at one of the 8 places.
template <class F, class Scaled>
void TestFloatCodes(float factor, const Scaled& scaled_at) {
  const Format format = DescribeFormat<F>();
  ForEachCode(F::kBits, [&](const uint8_t* codes) {
    uint32_t words[2] = {};
    uint8_t bytes[8];
    F::EncodeFragment(codes, bytes);
    std::memcpy(words, bytes, F::kBits);
    for (int i = 0; i < 8; ++i) {
      const float expected = format.centered[codes[i]];
      if (std::isnan(expected)) continue;  // refused when weights are read
      const float value = scaled_at(words, i) * factor;
      EXPECT(value == expected && std::signbit(value) == std::signbit(expected),
             "%s code %d place %d: %g not %g", F::kName, codes[i], i, value, expected);
      EXPECT(HalfToFloat(FloatToHalf(value)) == value &&
                 BFloat16ToFloat(FloatToBFloat16(value)) == value,
             "%s code %d: %g is no float16 or bfloat16", F::kName, codes[i], value);
    }
  });
}

template <class F>
void TestE2M1() {
  TestFloatCodes<F>(0x1p14f, [](const uint32_t* words, int place) {
    return Half(F::ScaledHalf2(words[0], place / 2), place % 2);
  });
  TestFloatCodes<F>(0x1p126f, [](const uint32_t* words, int place) {
    return BFloat16ToFloat(uint16_t(F::ScaledBFloat162(words[0], place / 2) >> (16 * (place % 2))));
  });
}

void TestFloats() {
  TestE2M1<formats::mxfp4>();
  TestE2M1<formats::nvfp4>();
  TestFloatCodes<formats::fp8_e4m3>(0x1p8f, [](const uint32_t* words, int place) {
    return Half(formats::fp8_e4m3::ScaledHalf2(words, place / 2), place % 2);
  });
  // The tables by hand: what the codes mean.
  const float e2m1_values[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (uint32_t code = 0; code < 16; ++code)
    EXPECT(DecodeE2M1(code) == (code < 8 ? 1 : -1) * e2m1_values[code % 8], "e2m1 %u", code);
  for (uint32_t code = 0; code < 256; ++code) {
    const int exponent = int(code >> 3 & 15), mantissa = int(code & 7);
    const double magnitude =
        exponent ? std::ldexp(1 + mantissa / 8.0, exponent - 7) : std::ldexp(mantissa / 8.0, -6);
    const float value = DecodeE4M3(code), expected = float(code & 0x80 ? -magnitude : magnitude);
    const bool nan = (code & 0x7f) == 0x7f;
    EXPECT(nan ? std::isnan(value) : value == expected, "e4m3 %u: %g", code, value);
    EXPECT(nan ? std::isnan(Float8E4M3ToFloat(uint8_t(code)))
               : Float8E4M3ToFloat(uint8_t(code)) == expected,
           "scale e4m3 %u", code);
  }
}

/// The default EncodeFragment and DequantFragment of FormatBase agree, for every width.
template <int kBits>
struct Plain : formats::FormatBase<Plain<kBits>, kBits> {
  static constexpr char kName[] = "plain";
  static constexpr float kDefaultZeroPoint = 1;
  static constexpr bool kZeroPoints = true;
  static float Decode(uint32_t code) { return float(code); }
};

template <int kBits>
void TestPlain() {
  struct Float2 {
    float x, y;
  };
  const std::vector<uint8_t> codes = RandomCodes(kBits);
  for (size_t first = 0; first + 8 <= codes.size(); first += 8) {
    uint8_t bytes[8] = {};
    Plain<kBits>::EncodeFragment(&codes[first], bytes);
    uint32_t words[2];
    std::memcpy(words, bytes, sizeof words);
    Float2 values[4];
    Plain<kBits>::DequantFragment(words, values);
    for (int i = 0; i < 8; ++i)
      EXPECT((i % 2 ? values[i / 2].y : values[i / 2].x) == float(codes[first + i]) - 1,
             "%d bits, code %d", kBits, i);
  }
}

/// Reader order to tile rows to slots: a bijection, gates above their ups, a lane's two slots side
/// by side.
void TestRowsAndSlots() {
  const TileLayout& layout = GetTileLayout(Layout::kCudaTile16x64);
  EXPECT(layout.k_multiple == kTileK, "%d", layout.k_multiple);
  for (bool gated : {false, true}) {
    unsigned rows = 0, slots = 0;
    for (int i = 0; i < 16; ++i) {
      const int row = layout.tile_row(i, gated);
      EXPECT(row == (gated ? i / 2 + i % 2 * 8 : i), "row %d", i);
      rows |= 1u << row;
      slots |= 1u << layout.slot(row);
    }
    EXPECT(rows == 0xffff && slots == 0xffff, "%x %x", rows, slots);
  }
  for (int g = 0; g < 8; ++g)
    EXPECT(layout.slot(g) == 2 * g && layout.slot(g + 8) == 2 * g + 1, "g %d", g);
}

int Main() {
  TestRowsAndSlots();
  EXPECT(FindFormat("int4") && FindFormat("int8"), "%zu formats", Formats().size());
  for (const Format* format : Formats()) {
    TestPlaces(*format);
    if (!format->plain()) TestFragmentKeepsCodes(*format);
  }
  TestInt4(GetFormat("int4"));
  TestInt8(GetFormat("int8"));
  TestFloats();
  TestPlain<2>();
  TestPlain<4>();
  TestPlain<8>();
  std::printf("%s, %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures != 0;
}

}  // namespace
}  // namespace qmoe_plugin

int main() { return qmoe_plugin::Main(); }
