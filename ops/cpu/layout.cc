#include "ops/cpu/layout.h"

#include <bit>
#include <cstring>

#include "ops/pack.h"

namespace qmoe_plugin::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "dwords are put together from bytes");

/// The 4 codes at `codes`, one a byte, as a dword.
uint32_t FourCodes(const uint8_t* codes) {
  uint32_t word;
  std::memcpy(&word, codes, sizeof word);
  return word;
}

template <int Bits>
void Encode(const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  constexpr int kCodes = 32 / Bits;
  for (int64_t k = 0; k < k_padded; k += kCodes) {
    for (int n = 0; n < kPanelRows; ++n, out += 4) {
      const uint8_t* row = codes + n * k_padded + k;
      uint32_t word = 0;
      for (int j = 0; j < kCodes; j += 4) word |= FourCodes(row + j) << CodeShift(Bits, j);
      std::memcpy(out, &word, sizeof word);
    }
  }
}

/// Dwords of one 32-bit or two 16-bit codes.
void EncodePlain(int code_bytes, const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  const int64_t row_bytes = k_padded * code_bytes;
  for (int64_t at = 0; at < row_bytes; at += 4)
    for (int n = 0; n < kPanelRows; ++n, out += 4) std::memcpy(out, codes + n * row_bytes + at, 4);
}

const bool registered = RegisterTileLayout({.layout = Layout::kCpuPanel16,
                                            .k_multiple = 32,
                                            .tile_row = [](int i, bool) { return i; },
                                            .slot = [](int tile_row) { return tile_row; },
                                            .encode_tile = EncodePanel});

}  // namespace

void EncodePanel(const Format& format, const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  if (format.plain()) return EncodePlain(format.code_bytes(), codes, k_padded, out);
  switch (format.bits) {
    case 2:
      return Encode<2>(codes, k_padded, out);
    case 4:
      return Encode<4>(codes, k_padded, out);
    default:
      return Encode<8>(codes, k_padded, out);
  }
}

}  // namespace qmoe_plugin::cpu
