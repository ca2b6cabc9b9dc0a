// Packed weights: what Pack() (ops/pack.h) makes out of a model's weights, and what every kernel
// reads.
//
// Output rows are grouped in tiles of 16. A 64-byte header says what the bytes are; kernels refuse
// foreign ones. Behind it, each section aligned to 256 bytes, Tn = ceil(rows / 16), Kp = K rounded
// up to the layout's k_multiple, G = blocks that cover Kp (0 for per channel):
//
//   codes        [E, Tn, Kp * 16 * bits / 8]  bytes of a tile in the order of the layout
//   block_scales [E, Tn, G, 16]               float16 or float32, see TileLayout::slot
//   zero_offsets [E, Tn, G or 1, 16]          same type; only if the model gives zero points
//   row_scales   [E, Tn, 16]                  float32, one factor a row, applied to the accumulator:
//                                             the scale of a per-channel row, or the power of two
//                                             that was taken out of the row's block scales;
//                                             times the scale of the activations, if one is given
//   bias         [E, Tn, 16]                  float32; only if the model gives a bias
//   codebook     [2^bits]                     float32, value of each code; formats with a codebook
//
// w = (centered(code) + zero_offset) * block_scale * row_scale. Padding codes decode to anything;
// kernels must multiply them by zero activations. Padding rows have scale 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "ops/dtype.h"

namespace qmoe_plugin {

enum class Layout : uint16_t {
  /// MMA A fragments in lane order, see ops/gemm/layout.h. Tiles of 16 rows x 64 k. Tile row r of a
  /// gated matrix: gates
  /// are rows 0 to 7, their ups rows 8 to 15. Scale slot 2g is tile row g, slot 2g + 1 is tile row
  /// g + 8.
  kCudaTile16x64 = 1,
  /// 16 output columns a panel, dwords of consecutive k, see ops/cpu/layout.h. Rows and slots in
  /// natural order.
  kCpuPanel16 = 2,
};

const char* Name(Layout layout);
/// What kernels with this layout run on: "CUDA GPUs from sm_80", "CPUs".
const char* DeviceOf(Layout layout);

/// The first 64 bytes of packed weights. Integers are little endian.
struct PackedHeader {
  static constexpr char kMagic[8] = {'Q', 'M', 'O', 'E', 'P', 'A', 'C', 'K'};
  static constexpr uint16_t kVersion = 1;
  enum Flags : uint32_t {
    kGated = 1,
    kZeroOffsets = 2,
    kBias = 4,
    kSumScale = 8,    // a scale of the activations is in row_scales
    kPermutedK = 16,  // K is not as stored (g_idx): only of use to who packed them
    kCodebook = 32,
    kIntegerOffsets = 64,  // of zero offsets: none is a fraction
    kShortFactors = 128,   // values and block scales are exact in bfloat16, too
    kCoarseScales = 256    // ScalesAreCoarse (ops/pack_scales.h); only looked for where it matters
  };

  char magic[8];
  uint16_t version;
  Layout layout;
  char format[12];      // name, zero-padded
  uint32_t experts;     // E
  uint32_t rows;        // N, without padding
  uint32_t k;           // K, without padding
  uint32_t block_size;  // 0 = per channel
  uint32_t flags;
  uint16_t scale_dtype;  // DType of block_scales and zero_offsets
  uint16_t encoding;     // digest of how the layout encodes the format's codes, see EncodingOf
  uint64_t bytes;        // all of it, header included
  uint64_t checksum;     // of the header with this field zero

  std::string FormatName() const;
};
static_assert(sizeof(PackedHeader) == 64);

/// Offsets and strides of the sections, in bytes unless said otherwise; a function of the header
/// alone.
struct PackedShape {
  int64_t row_tiles;                                                     // Tn
  int64_t k_padded;                                                      // Kp
  int64_t groups;                                                        // G; 0 = per channel
  int64_t tile_bytes;                                                    // codes of one 16-row tile
  size_t codes, block_scales, zero_offsets, row_scales, bias, codebook;  // offset; 0 = absent
  size_t total;
};
PackedShape ShapeOf(const PackedHeader& header);

/// Packed weights in host or device memory. Copies share the memory.
struct PackedWeights {
  PackedHeader header;
  PackedShape shape;
  std::shared_ptr<uint8_t> memory;  // header and sections

  const uint8_t* codes() const { return memory.get() + shape.codes; }
  const void* block_scales() const { return At(shape.block_scales); }
  const void* zero_offsets() const { return At(shape.zero_offsets); }
  const float* row_scales() const { return static_cast<const float*>(At(shape.row_scales)); }
  const float* bias() const { return static_cast<const float*>(At(shape.bias)); }
  const float* codebook() const { return static_cast<const float*>(At(shape.codebook)); }
  DType scale_dtype() const { return DType(header.scale_dtype); }
  bool gated() const { return header.flags & PackedHeader::kGated; }

 private:
  const void* At(size_t offset) const { return offset ? memory.get() + offset : nullptr; }
};

/// Throws Error unless the header is intact and of this version, layout and format.
void CheckHeader(const PackedHeader& header, Layout layout, const char* format);

/// The header of `size` bytes of packed weights, of which only the header is read. Throws Error if
/// they are not packed weights, not whole, of another version, damaged in the header, or of a format
/// or layout that this build does not know or encodes differently.
PackedHeader ReadPackedHeader(const void* bytes, size_t size);

/// Whether LoadPacked uses bytes at this address in place: they must be aligned to 64 bytes.
bool LoadsInPlace(const void* bytes);

/// Packed weights that lie in memory, such as a mapped model file: used in place where they are
/// aligned, else copied. Throws Error as ReadPackedHeader.
PackedWeights LoadPacked(const void* bytes, size_t size);

/// Fills magic, version, encoding, bytes and checksum.
void SealHeader(PackedHeader& header);

}  // namespace qmoe_plugin
