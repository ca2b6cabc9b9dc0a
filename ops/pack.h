// Packs a model's weights into a kernel layout, tile by tile, on all cores, without ever holding a
// second copy.
#pragma once

#include <functional>

#include "ops/packed_weights.h"
#include "ops/weights.h"

namespace qmoe_plugin {

/// What a layout adds to the common packing.
struct TileLayout {
  Layout layout;
  int k_multiple;  // Kp is a multiple of it, and so is a block that is larger; 64 on CUDA, 32 on
                   // the CPU
  /// Tile row (0 to 15) of row `i` of a tile, in the reader's order (gate_0, up_0, gate_1, ... when
  /// gated).
  int (*tile_row)(int i, bool gated);
  /// Slot (0 to 15) in block_scales, zero_offsets, row_scales and bias of a tile row. The same for
  /// all four.
  int (*slot)(int tile_row);
  /// Lays out the codes of one tile, [16][k_padded] of Format::code_bytes() each, tile rows in
  /// order, into tile_bytes bytes.
  void (*encode_tile)(const Format& format, const uint8_t* codes, int64_t k_padded, uint8_t* out);
};

const TileLayout& GetTileLayout(Layout layout);
bool RegisterTileLayout(const TileLayout& layout);

/// How block scales are stored. Both take a power of two out of each row (into row_scales) so that
/// its largest block scale lies in [16, 32): float16 products (centered + offset) * scale cannot
/// overflow.
enum class ScalePolicy {
  kFloat16,  // rounded to float16 (exact unless the model's scales have more than 11 significant
             // bits)
  kFloat16IfExact,  // float16 when that loses nothing, else float32
  kFloat32,
};

/// Where packed bytes go. Either `base` is host memory of the full size, written in place, or
/// `write` is called with finished pieces (any order, one at a time) while at most `staging_bytes`
/// of host memory are in use.
struct PackSink {
  uint8_t* base = nullptr;
  std::function<void(size_t offset, const uint8_t* bytes, size_t size)> write;
  size_t staging_bytes = size_t(16) << 20;
};

/// The header that Pack will use for these weights.
PackedHeader PlanPack(const RowReader& reader, bool gated, Layout layout, ScalePolicy policy);

/// Packs. Throws Error for scales or zero points that are not finite.
void Pack(const RowReader& reader, const PackedHeader& header, const PackSink& sink);

/// PlanPack and Pack into memory of AllocateHost (ops/host_memory.h).
PackedWeights PackToHost(const RowReader& reader, bool gated, Layout layout, ScalePolicy policy);

}  // namespace qmoe_plugin
