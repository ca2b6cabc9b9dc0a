// Where the codes of a 16-row tile lie in packed weights for CUDA (Layout::kCudaTile16x64).
//
// A tile is 16 rows x 64 k and takes 128 * bits bytes; the tiles of one row tile follow each other
// along k. Lane l = 4 g + t of a warp owns 4 fragments, the A operands of mma.m16n8k16 in the k16
// steps j = 0 to 3. Fragment j holds
//
//   rows g and g + 8,  k = 16 j + {2t, 2t+1, 2t+8, 2t+9}
//
// in the order of ops/formats/format.h, in `bits` bytes, as the format's EncodeFragment writes them:
//
//   2 bits   256 bytes: lane l owns 8 at 8 l, fragment j at + 2 j
//   4 bits   512 bytes: lane l owns 16 at 16 l, fragment j at + 4 j
//   8 bits   two chunks of 512 bytes, for j = 0, 1 and j = 2, 3: lane l owns 16 in each at 16 l,
//            fragment j at + 8 (j mod 2)
//   16 bits  four chunks of 512 bytes, one a fragment: lane l owns 16 in each at 16 l
//   32 bits  eight chunks, two a fragment: its first 16 bytes lie in chunk 2 j, the others in
//            chunk 2 j + 1
//
// So a warp reads a tile with whole 512-byte loads and no shuffles, K keeps its natural order
// (activations are not permuted), four row tiles stacked are the A operand of a 64-row wgmma, and a
// bulk copy can fetch any range of k.
//
// Scales, zero offsets, row scales and biases: slot 2g is tile row g, slot 2g+1 is tile row g+8, so
// that a lane loads the two that it needs at once. Gated: tile row i is the tile's gate i, tile row
// i + 8 its up.
#pragma once

#include <cstdint>

namespace qmoe_plugin {

inline constexpr int kTileRows = 16;
inline constexpr int kTileK = 64;
inline constexpr int kFragmentsPerTile = 4;  // of one lane

constexpr int TileBytes(int bits) { return kTileRows * kTileK * bits / 8; }

/// Bytes that a lane reads at once, and of all lanes together.
constexpr int LaneChunkBytes(int bits) { return bits == 2 ? 8 : 16; }
constexpr int ChunkBytes(int bits) { return 32 * LaneChunkBytes(bits); }

/// Where byte `byte` of fragment j of a lane lies in its tile.
constexpr int FragmentOffset(int bits, int lane, int j, int byte = 0) {
  const int at = j * bits + byte;  // among all bytes of the lane
  return at / LaneChunkBytes(bits) * ChunkBytes(bits) + lane * LaneChunkBytes(bits) +
         at % LaneChunkBytes(bits);
}

/// Tile row and k (0 to 15, within the k16 step) of code i (0 to 7) of a lane's fragment.
constexpr int FragmentRow(int lane, int i) { return lane / 4 + (i & 2 ? 8 : 0); }
constexpr int FragmentK(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i & 4 ? 8 : 0); }

constexpr int SlotOfTileRow(int tile_row) { return tile_row % 8 * 2 + tile_row / 8; }

}  // namespace qmoe_plugin
