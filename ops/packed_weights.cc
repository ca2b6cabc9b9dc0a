#include "ops/packed_weights.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "ops/error.h"
#include "ops/formats/format.h"
#include "ops/host_memory.h"
#include "ops/pack.h"

namespace qmoe_plugin {
namespace {

constexpr size_t kAlignment = 256;

size_t AlignUp(size_t value) { return (value + kAlignment - 1) / kAlignment * kAlignment; }

constexpr char kPackAgain[] = "; prepack the original model again with this qmoe_plugin";

/// FNV-1a, continued from `hash`.
uint64_t Hash(const void* data, size_t size, uint64_t hash = 0xcbf29ce484222325u) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}

/// Of the header with its checksum zeroed.
uint64_t Checksum(PackedHeader header) {
  header.checksum = 0;
  return Hash(&header, sizeof header);
}

/// A digest of what this build makes of codes and of what it takes them for: bytes from a build that
/// does it in another way must not pass, even if nobody thought of a new kVersion.
uint16_t EncodingOf(const TileLayout& layout, const Format& format) {
  const size_t k = size_t(layout.k_multiple), bits = size_t(format.bits);
  const size_t code_count = size_t(1) << std::min<size_t>(bits, 8);
  std::vector<uint8_t> codes(16 * k * std::max<size_t>(bits / 8, 1)), tile(16 * k * bits / 8);
  uint32_t state = 1;  // of a linear congruential generator, whose high bits are good
  for (uint8_t& code : codes) {
    state = state * 1664525u + 1013904223u;
    code = uint8_t((state >> 24) & (code_count - 1));
  }
  layout.encode_tile(format, codes.data(), int64_t(k), tile.data());
  int places[48];
  for (int i = 0; i < 16; ++i) {
    places[i] = layout.tile_row(i, false);
    places[16 + i] = layout.tile_row(i, true);
    places[32 + i] = layout.slot(i);
  }
  uint64_t hash = Hash(tile.data(), tile.size());
  hash = Hash(places, sizeof places, hash);
  for (size_t code = 0; code < code_count; ++code) {
    const float value = format.centered[code] == format.centered[code] ? format.centered[code] : 0;
    hash = Hash(&value, sizeof value, hash);  // not the bits of a NaN, which compilers may choose
  }
  return uint16_t(hash ^ (hash >> 16) ^ (hash >> 32) ^ (hash >> 48));
}

void CheckIntact(const PackedHeader& header) {
  if (std::memcmp(header.magic, PackedHeader::kMagic, sizeof header.magic) != 0)
    FailInvalid("these bytes are not packed weights (wrong magic)", kPackAgain);
  if (header.version != PackedHeader::kVersion)
    FailInvalid("packed weights are of version ", header.version, "; this build reads version ",
                PackedHeader::kVersion, kPackAgain);
  if (header.checksum != Checksum(header))
    FailInvalid("the header of packed weights is damaged", kPackAgain);
}

/// What GetFormat may be asked for: a name that a message can show.
bool IsName(const std::string& name) {
  return !name.empty() &&
         std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

/// Whether ShapeOf() can be asked without overflowing, and kernels can trust the answer.
bool Plausible(const PackedHeader& h) {
  const bool block = h.block_size == 0 || (std::has_single_bit(h.block_size) &&
                                           h.block_size >= 16 && h.block_size <= 65536);
  const bool scales =
      DType(h.scale_dtype) == DType::kFloat16 || DType(h.scale_dtype) == DType::kFloat32;
  const double codes = double(h.experts) * (double(h.rows) + 16) * (double(h.k) + 65536);
  return block && scales && h.experts > 0 && h.rows > 0 && h.k > 0 && codes < 0x1p52;
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

const char* DeviceOf(Layout layout) {
  return layout == Layout::kCudaTile16x64 ? "CUDA GPUs from sm_80" : "CPUs";
}

std::string PackedHeader::FormatName() const {
  return std::string(format, strnlen(format, sizeof format));
}

PackedShape ShapeOf(const PackedHeader& header) {
  const Format& format = GetFormat(header.FormatName());
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
  if (header.flags & PackedHeader::kCodebook)
    shape.codebook = place((size_t(1) << format.bits) * sizeof(float));
  shape.total = end;
  return shape;
}

void SealHeader(PackedHeader& header) {
  std::memcpy(header.magic, PackedHeader::kMagic, sizeof header.magic);
  header.version = PackedHeader::kVersion;
  header.encoding = EncodingOf(GetTileLayout(header.layout), GetFormat(header.FormatName()));
  header.bytes = ShapeOf(header).total;
  header.checksum = Checksum(header);
}

void CheckHeader(const PackedHeader& header, Layout layout, const char* format) {
  CheckIntact(header);
  if (header.layout != layout)
    FailInvalid("packed weights have layout ", Name(header.layout), "; this kernel reads ",
                Name(layout));
  if (header.FormatName() != format)
    FailInvalid("packed weights have format ", header.FormatName(), "; this kernel reads ", format);
}

PackedHeader ReadPackedHeader(const void* bytes, size_t size) {
  PackedHeader header;
  QMOE_REQUIRE(size >= sizeof header, "packed weights have ", size,
               " bytes, less than their header", kPackAgain);
  std::memcpy(&header, bytes, sizeof header);
  CheckIntact(header);
  QMOE_REQUIRE(IsName(header.FormatName()), "the header of packed weights makes no sense",
               kPackAgain);
  const TileLayout& layout = GetTileLayout(header.layout);  // throws if it is unknown
  const Format& format = GetFormat(header.FormatName());    // likewise
  QMOE_REQUIRE(header.encoding == EncodingOf(layout, format),
               "packed weights were made by another qmoe_plugin, which lays out ", format.name,
               " as ", Name(header.layout), " in another way", kPackAgain);
  const bool codebook = (header.flags & PackedHeader::kCodebook) != 0;
  QMOE_REQUIRE(Plausible(header) && codebook == format.codebook,
               "the header of packed weights makes no sense", kPackAgain);
  QMOE_REQUIRE(!(header.flags & PackedHeader::kPermutedK),
               "these weights were packed with a g_idx, whose order of K is not in the bytes; give "
               "them as they are in the original model");
  const size_t total = ShapeOf(header).total;
  QMOE_REQUIRE(header.bytes == total && size == total, "packed weights have ", size,
               " bytes, but their header stands for ", total, "; the file is damaged", kPackAgain);
  return header;
}

bool LoadsInPlace(const void* bytes) { return reinterpret_cast<uintptr_t>(bytes) % 64 == 0; }

PackedWeights LoadPacked(const void* bytes, size_t size) {
  PackedWeights packed{ReadPackedHeader(bytes, size), {}, {}};
  packed.shape = ShapeOf(packed.header);
  if (LoadsInPlace(bytes)) {  // without an owner
    packed.memory = {std::shared_ptr<void>(),
                     const_cast<uint8_t*>(static_cast<const uint8_t*>(bytes))};
  } else {
    packed.memory = AllocateHost(size);
    std::memcpy(packed.memory.get(), bytes, size);
  }
  return packed;
}

}  // namespace qmoe_plugin
