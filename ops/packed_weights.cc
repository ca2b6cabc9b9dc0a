#include "ops/packed_weights.h"

#include <algorithm>
#include <cstring>

#include "ops/error.h"
#include "ops/formats/format.h"
#include "ops/pack.h"

namespace qmoe_plugin {
namespace {

constexpr size_t kAlignment = 256;

size_t AlignUp(size_t value) { return (value + kAlignment - 1) / kAlignment * kAlignment; }

/// FNV-1a over the header with its checksum zeroed.
uint64_t Checksum(PackedHeader header) {
  header.checksum = 0;
  unsigned char bytes[sizeof header];
  std::memcpy(bytes, &header, sizeof header);
  uint64_t hash = 0xcbf29ce484222325u;
  for (unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;
  return hash;
}

std::string FormatName(const PackedHeader& header) {
  return std::string(header.format, strnlen(header.format, sizeof header.format));
}

}  // namespace

const char* Name(Layout layout) {
  switch (layout) {
    case Layout::kCudaTile16x64:
      return "cuda_tile16x64";
    case Layout::kCpuPanel16:
      return "cpu_panel16";
  }
  return "unknown layout";
}

PackedShape ShapeOf(const PackedHeader& header) {
  const Format& format = GetFormat(FormatName(header));
  const int64_t multiple =
      std::max<int64_t>(GetTileLayout(header.layout).k_multiple, header.block_size);
  PackedShape shape{};
  shape.row_tiles = (int64_t(header.rows) + 15) / 16;
  shape.k_padded = (int64_t(header.k) + multiple - 1) / multiple * multiple;
  shape.groups = header.block_size ? shape.k_padded / header.block_size : 0;
  shape.tile_bytes = shape.k_padded * 16 * format.bits / 8;
  const size_t tiles = size_t(header.experts) * size_t(shape.row_tiles);
  const size_t scale_size = SizeOf(DType(header.scale_dtype));
  size_t end = AlignUp(sizeof(PackedHeader));
  const auto place = [&end](size_t bytes) {
    const size_t offset = end;
    end = AlignUp(end + bytes);
    return offset;
  };
  shape.codes = place(tiles * size_t(shape.tile_bytes));
  if (shape.groups) shape.block_scales = place(tiles * size_t(shape.groups) * 16 * scale_size);
  if (header.flags & PackedHeader::kZeroOffsets)
    shape.zero_offsets =
        place(tiles * size_t(std::max<int64_t>(shape.groups, 1)) * 16 * scale_size);
  shape.row_scales = place(tiles * 16 * sizeof(float));
  if (header.flags & PackedHeader::kBias) shape.bias = place(tiles * 16 * sizeof(float));
  shape.total = end;
  return shape;
}

void SealHeader(PackedHeader& header) {
  std::memcpy(header.magic, PackedHeader::kMagic, sizeof header.magic);
  header.version = PackedHeader::kVersion;
  header.reserved = 0;
  header.bytes = ShapeOf(header).total;
  header.checksum = Checksum(header);
}

void CheckHeader(const PackedHeader& header, Layout layout, const char* format) {
  if (std::memcmp(header.magic, PackedHeader::kMagic, sizeof header.magic) != 0)
    FailInvalid("these bytes are not packed weights (wrong magic)");
  if (header.version != PackedHeader::kVersion)
    FailInvalid("packed weights are of version ", header.version, "; this build reads version ",
                PackedHeader::kVersion, "; pack them again");
  if (header.checksum != Checksum(header))
    FailInvalid("the header of packed weights is damaged; pack them again");
  if (header.layout != layout)
    FailInvalid("packed weights have layout ", Name(header.layout), "; this kernel reads ",
                Name(layout));
  if (FormatName(header) != format)
    FailInvalid("packed weights have format ", FormatName(header), "; this kernel reads ", format);
}

}  // namespace qmoe_plugin
