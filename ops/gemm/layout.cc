#include "ops/gemm/layout.h"

#include <bit>
#include <cstring>

#include "ops/pack.h"

namespace qmoe_plugin {
namespace {

static_assert(std::endian::native == std::endian::little);

int TileRow(int i, bool gated) {
  if (!gated) return i;
  return i % 2 ? 8 + i / 2 : i / 2;
}

uint64_t LoadPair(const uint8_t* codes) {
  uint16_t pair;
  std::memcpy(&pair, codes, sizeof pair);
  return pair;
}

/// Codes of 16 or 32 bits.
template <int kBits>
void EncodePlainTile(const Format& format, const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  constexpr int kCode = kBits / 8, kPair = 2 * kCode, kPiece = LaneChunkBytes(kBits);
  for (int64_t k = 0; k < k_padded; k += kTileK, out += TileBytes(kBits)) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < kFragmentsPerTile; ++j) {
        uint8_t pairs[4 * kPair], fragment[kBits];
        for (int i = 0; i < 8; i += 2) {
          const int64_t at = FragmentRow(lane, i) * k_padded + k + 16 * j + FragmentK(lane, i);
          std::memcpy(pairs + i * kCode, codes + at * kCode, kPair);
        }
        format.encode_fragment(pairs, fragment);
        for (int byte = 0; byte < kBits; byte += kPiece)
          std::memcpy(out + FragmentOffset(kBits, lane, j, byte), fragment + byte, kPiece);
      }
    }
  }
}

template <int kBits>
void EncodeTile(const Format& format, const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  const auto encode = format.encode_fragment;
  for (int64_t k = 0; k < k_padded; k += kTileK, out += TileBytes(kBits)) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint8_t* upper = codes + FragmentRow(lane, 0) * k_padded + k + FragmentK(lane, 0);
      const uint8_t* lower = upper + 8 * k_padded;
      for (int j = 0; j < kFragmentsPerTile; ++j) {
        // Put together in a register: a store of pairs and a load of eight would stall.
        const uint64_t eight = LoadPair(upper + 16 * j) | LoadPair(lower + 16 * j) << 16 |
                               LoadPair(upper + 16 * j + 8) << 32 |
                               LoadPair(lower + 16 * j + 8) << 48;
        uint8_t fragment[8];
        std::memcpy(fragment, &eight, sizeof eight);
        encode(fragment, out + FragmentOffset(kBits, lane, j));
      }
    }
  }
}

void EncodeTileOfFormat(const Format& format, const uint8_t* codes, int64_t k_padded,
                        uint8_t* out) {
  switch (format.bits) {
    case 2:
      return EncodeTile<2>(format, codes, k_padded, out);
    case 4:
      return EncodeTile<4>(format, codes, k_padded, out);
    case 16:
      return EncodePlainTile<16>(format, codes, k_padded, out);
    case 32:
      return EncodePlainTile<32>(format, codes, k_padded, out);
    default:
      return EncodeTile<8>(format, codes, k_padded, out);
  }
}

[[maybe_unused]] const bool registered = RegisterTileLayout({.layout = Layout::kCudaTile16x64,
                                                             .k_multiple = kTileK,
                                                             .tile_row = &TileRow,
                                                             .slot = &SlotOfTileRow,
                                                             .encode_tile = &EncodeTileOfFormat});

}  // namespace
}  // namespace qmoe_plugin
