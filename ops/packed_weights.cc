#include "ops/packed_weights.h"

#include <algorithm>
#include <bit>
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

void CheckIntact(const PackedHeader& header) {
  if (std::memcmp(header.magic, PackedHeader::kMagic, sizeof header.magic) != 0)
    FailInvalid("these bytes are not packed weights (wrong magic)");
  if (header.version != PackedHeader::kVersion)
    FailInvalid("packed weights are of version ", header.version, "; this build reads version ",
                PackedHeader::kVersion, "; pack them again");
  if (header.checksum != Checksum(header))
    FailInvalid("the header of packed weights is damaged; pack them again");
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
  header.reserved = 0;
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

PackedWeights LoadPacked(const void* bytes, size_t size) {
  PackedWeights packed{};
  QMOE_REQUIRE(size >= sizeof packed.header, "packed weights have ", size,
               " bytes, less than their header");
  std::memcpy(&packed.header, bytes, sizeof packed.header);
  CheckIntact(packed.header);
  GetTileLayout(packed.header.layout);                           // throws if it is unknown
  const Format& format = GetFormat(packed.header.FormatName());  // likewise
  const bool codebook = (packed.header.flags & PackedHeader::kCodebook) != 0;
  QMOE_REQUIRE(Plausible(packed.header) && codebook == format.codebook,
               "the header of packed weights makes no sense; pack them again");
  packed.shape = ShapeOf(packed.header);
  QMOE_REQUIRE(packed.header.bytes == packed.shape.total && size == packed.shape.total,
               "packed weights have ", size, " bytes, but their header stands for ",
               packed.shape.total, "; the file is damaged, pack them again");
  if (reinterpret_cast<uintptr_t>(bytes) % 64 == 0) {  // without an owner
    packed.memory = {std::shared_ptr<void>(),
                     const_cast<uint8_t*>(static_cast<const uint8_t*>(bytes))};
  } else {
    packed.memory = AllocateHost(size);
    std::memcpy(packed.memory.get(), bytes, size);
  }
  return packed;
}

}  // namespace qmoe_plugin
