#include "ops/pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "ops/error.h"
#include "ops/host_memory.h"
#include "ops/pack_scales.h"
#include "ops/threads.h"

namespace qmoe_plugin {
namespace {

std::vector<TileLayout>& TileLayouts() {
  static std::vector<TileLayout> layouts;
  return layouts;
}

/// Packs tiles [first, last) of all experts' tiles, counted through; one worker's scratch memory.
class TilePacker {
 public:
  TilePacker(const RowReader& reader, const PackedHeader& header)
      : reader_(reader),
        header_(header),
        shape_(ShapeOf(header)),
        layout_(GetTileLayout(header.layout)),
        gated_(header.flags & PackedHeader::kGated),
        codes_(16 * shape_.k_padded * reader.format().code_bytes()),
        scales_(reader.groups()),
        offsets_(reader.groups()) {}

  /// Each pointer receives the bytes of this tile in its section; those of absent sections are
  /// null.
  struct Outputs {
    uint8_t *codes, *block_scales, *zero_offsets, *row_scales, *bias;
  };

  void PackTile(int64_t tile, const Outputs& out) {
    const int64_t expert = tile / shape_.row_tiles, first_row = tile % shape_.row_tiles * 16;
    std::fill(codes_.begin(), codes_.end(), uint8_t(0));
    ClearScales(out);
    const int rows = int(std::min<int64_t>(16, reader_.rows() - first_row));
    uint8_t* code_rows[16];
    for (int i = 0; i < rows; ++i) {
      const int tile_row = layout_.tile_row(i, gated_), slot = layout_.slot(tile_row);
      code_rows[i] = codes_.data() + tile_row * shape_.k_padded * reader_.format().code_bytes();
      PackScales(expert, first_row + i, slot, out);
      if (out.bias) reinterpret_cast<float*>(out.bias)[slot] = reader_.Bias(expert, first_row + i);
    }
    reader_.Codes(expert, first_row, rows, code_rows);
    layout_.encode_tile(reader_.format(), codes_.data(), shape_.k_padded, out.codes);
  }

 private:
  int64_t stored_groups() const { return std::max<int64_t>(shape_.groups, 1); }

  void ClearScales(const Outputs& out) {
    const size_t bytes = size_t(stored_groups()) * 16 * SizeOf(DType(header_.scale_dtype));
    if (out.block_scales) std::memset(out.block_scales, 0, bytes);
    if (out.zero_offsets) std::memset(out.zero_offsets, 0, bytes);
    std::memset(out.row_scales, 0, 16 * sizeof(float));
    if (out.bias) std::memset(out.bias, 0, 16 * sizeof(float));
  }

  void PackScales(int64_t expert, int64_t row, int slot, const Outputs& out) {
    const DType dtype = DType(header_.scale_dtype);
    const size_t place = size_t(slot) * SizeOf(dtype);
    reader_.Scales(expert, row, scales_.data());
    float row_scale = scales_[0];
    if (out.block_scales) {
      row_scale = RowFactor(scales_.data(), reader_.groups());
      StoreScales(scales_.data(), row_scale, reader_.groups(), dtype, out.block_scales + place);
    }
    reinterpret_cast<float*>(out.row_scales)[slot] = row_scale * reader_.SumScale(expert);
    if (!out.zero_offsets) return;
    reader_.ZeroOffsets(expert, row, offsets_.data());
    StoreScales(offsets_.data(), 1.0f, reader_.groups(), dtype, out.zero_offsets + place);
  }

  const RowReader& reader_;
  const PackedHeader& header_;
  const PackedShape shape_;
  const TileLayout& layout_;
  const bool gated_;
  std::vector<uint8_t> codes_;  // [16][k_padded], code_bytes() each
  std::vector<float> scales_, offsets_;
};

/// One piece of every section, for a run of tiles: where it goes in the packed bytes and how long a
/// tile is.
struct Section {
  size_t offset;      // 0 = absent
  size_t tile_bytes;  // bytes a tile
};

std::vector<Section> Sections(const PackedHeader& header, const PackedShape& shape) {
  const size_t scale_size = SizeOf(DType(header.scale_dtype));
  const size_t scales = size_t(std::max<int64_t>(shape.groups, 1)) * 16 * scale_size;
  return {{shape.codes, size_t(shape.tile_bytes)},
          {shape.block_scales, scales},
          {shape.zero_offsets, scales},
          {shape.row_scales, 16 * sizeof(float)},
          {shape.bias, 16 * sizeof(float)}};
}

TilePacker::Outputs OutputsAt(const std::vector<uint8_t*>& p) {
  return {p[0], p[1], p[2], p[3], p[4]};
}

void PackInPlace(const RowReader& reader, const PackedHeader& header, uint8_t* base) {
  const PackedShape shape = ShapeOf(header);
  const std::vector<Section> sections = Sections(header, shape);
  const int64_t tiles = int64_t(header.experts) * shape.row_tiles;
  std::atomic<int64_t> next = 0;
  OnAllCores([&] {
    TilePacker packer(reader, header);
    std::vector<uint8_t*> out(sections.size());
    for (int64_t tile; (tile = next++) < tiles;) {
      for (size_t s = 0; s < sections.size(); ++s)
        out[s] = sections[s].offset
                     ? base + sections[s].offset + size_t(tile) * sections[s].tile_bytes
                     : nullptr;
      packer.PackTile(tile, OutputsAt(out));
    }
  });
}

/// Each worker packs runs of tiles into its own share of the staging memory and writes them out one
/// at a time.
void PackStaged(const RowReader& reader, const PackedHeader& header, const PackSink& sink) {
  const PackedShape shape = ShapeOf(header);
  const std::vector<Section> sections = Sections(header, shape);
  const int64_t tiles = int64_t(header.experts) * shape.row_tiles;
  size_t tile_bytes = 0;
  for (const Section& s : sections) tile_bytes += s.offset ? s.tile_bytes : 0;
  const size_t share = sink.staging_bytes / CoreCount();
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(tiles, int64_t(share / tile_bytes)));
  std::atomic<int64_t> next = 0;
  std::mutex write_mutex;
  OnAllCores([&] {
    TilePacker packer(reader, header);
    std::vector<uint8_t> staging(size_t(run) * tile_bytes);
    std::vector<uint8_t*> starts(sections.size()), out(sections.size());
    size_t used = 0;
    for (size_t s = 0; s < sections.size(); ++s) {
      starts[s] = sections[s].offset ? staging.data() + used : nullptr;
      if (starts[s]) used += size_t(run) * sections[s].tile_bytes;
    }
    for (int64_t first; (first = next.fetch_add(run)) < tiles;) {
      const int64_t count = std::min(run, tiles - first);
      for (int64_t i = 0; i < count; ++i) {
        for (size_t s = 0; s < sections.size(); ++s)
          out[s] = starts[s] ? starts[s] + size_t(i) * sections[s].tile_bytes : nullptr;
        packer.PackTile(first + i, OutputsAt(out));
      }
      const std::lock_guard lock(write_mutex);
      for (size_t s = 0; s < sections.size(); ++s)
        if (starts[s])
          sink.write(sections[s].offset + size_t(first) * sections[s].tile_bytes, starts[s],
                     size_t(count) * sections[s].tile_bytes);
    }
  });
}

}  // namespace

bool RegisterTileLayout(const TileLayout& layout) {
  TileLayouts().push_back(layout);
  return true;
}

const TileLayout& GetTileLayout(Layout layout) {
  for (const TileLayout& candidate : TileLayouts())
    if (candidate.layout == layout) return candidate;
  FailInvalid("packed weights have an unknown layout (", int(layout), ")");
}

PackedHeader PlanPack(const RowReader& reader, bool gated, Layout layout, ScalePolicy policy) {
  const bool half = policy == ScalePolicy::kFloat16 ||
                    (policy == ScalePolicy::kFloat16IfExact && ScalesFitHalf(reader));
  const bool coarse = policy == ScalePolicy::kFloat16 && reader.format().affine &&
                      reader.block_size() != 0 && !reader.has_zero_points() &&
                      ScalesAreCoarse(reader);
  PackedHeader header{};
  header.layout = layout;
  const size_t name_size = std::strlen(reader.format().name);
  QMOE_REQUIRE(name_size <= sizeof header.format, "the format name ", reader.format().name,
               " is longer than ", sizeof header.format, " characters");
  std::memcpy(header.format, reader.format().name, name_size);
  header.experts = uint32_t(reader.experts());
  header.rows = uint32_t(reader.rows());
  header.k = uint32_t(reader.k());
  header.block_size = uint32_t(reader.block_size());
  header.flags = (gated ? PackedHeader::kGated : 0u) |
                 (reader.has_zero_points() ? PackedHeader::kZeroOffsets : 0u) |
                 (reader.has_integer_zero_points() ? PackedHeader::kIntegerOffsets : 0u) |
                 (reader.has_short_factors() ? PackedHeader::kShortFactors : 0u) |
                 (coarse ? PackedHeader::kCoarseScales : 0u) |
                 (reader.has_bias() ? PackedHeader::kBias : 0u) |
                 (reader.has_sum_scale() ? PackedHeader::kSumScale : 0u) |
                 (reader.codebook().empty() ? 0u : PackedHeader::kCodebook) |
                 (reader.k_order().empty() ? 0u : PackedHeader::kPermutedK);
  header.scale_dtype = uint16_t(half ? DType::kFloat16 : DType::kFloat32);
  SealHeader(header);
  return header;
}

void Pack(const RowReader& reader, const PackedHeader& header, const PackSink& sink) {
  CheckHeader(header, header.layout, reader.format().name);
  const auto write = [&sink](size_t offset, const void* bytes, size_t size) {
    if (sink.base != nullptr)
      std::memcpy(sink.base + offset, bytes, size);
    else
      sink.write(offset, static_cast<const uint8_t*>(bytes), size);
  };
  write(0, &header, sizeof header);
  const std::vector<float>& codebook = reader.codebook();
  if (!codebook.empty())
    write(ShapeOf(header).codebook, codebook.data(), codebook.size() * sizeof(float));
  if (sink.base != nullptr)
    PackInPlace(reader, header, sink.base);
  else
    PackStaged(reader, header, sink);
}

PackedWeights PackToHost(const RowReader& reader, bool gated, Layout layout, ScalePolicy policy) {
  const PackedHeader header = PlanPack(reader, gated, layout, policy);
  PackedWeights packed{header, ShapeOf(header), AllocateHost(header.bytes)};
  Pack(reader, header, {.base = packed.memory.get(), .write = {}});
  return packed;
}

}  // namespace qmoe_plugin
