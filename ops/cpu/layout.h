// The CPU's packed layout, Layout::kCpuPanel16: a panel is 16 output rows, one a SIMD lane.
//
// A panel holds, one after the other, vectors of 64 bytes: lane n (a dword) has D = 32 / bits codes
// of row n, consecutive in k, so a vector covers D k of all 16 rows. Code j of a dword lies at bit
// 8 * (j % 4) + bits * (j / 4):
//
//   8-bit: byte b = k + b                                        32 k = 8 vectors
//   4-bit: byte b = k + b (low nibble), k + 4 + b (high)         32 k = 4 vectors
//   2-bit: byte b = k + b, k + 4 + b, k + 8 + b, k + 12 + b      32 k = 2 vectors
//
// Plain codes lie in a dword as they come: 16-bit ones at bits 0 and 16, 32-bit ones alone.
//
// Why: one vector load feeds all instruction sets. A shift by the position above makes a dword the
// index of a table look-up (AVX-512, AVX2); masked by bytes it is four consecutive k, which is the
// operand of vpdpbusd and of NEON's sdot, and a row of an AMX int8 tile.
//
// Rows and slots are in natural order (a gated matrix alternates gates and ups in the lanes), and
// k is padded to a multiple of 32 (of the block, where that is larger).
#pragma once

#include <cstdint>

#include "ops/formats/format.h"

namespace qmoe_plugin::cpu {

inline constexpr int kPanelRows = 16;

/// Bit at which code `j` of a dword starts.
constexpr int CodeShift(int bits, int j) {
  return bits > 8 ? bits * j : 8 * (j % 4) + bits * (j / 4);
}

/// Lays out codes [16][k_padded], Format::code_bytes() each, as above (TileLayout::encode_tile).
void EncodePanel(const Format& format, const uint8_t* codes, int64_t k_padded, uint8_t* out);

}  // namespace qmoe_plugin::cpu
