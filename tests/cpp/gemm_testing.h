// What the C++ tests of the CPU's GEMMs share: formats of all kinds, and how a kernel is called.
#pragma once

#include <cstring>

#include "ops/pack.h"
#include "tests/cpp/cpu_testing.h"

namespace qmoe_plugin {

// Formats that nobody registers but that the kernels must take: the table paths of each width.
struct two_bits : formats::FormatBase<two_bits, 2> {
  static constexpr char kName[] = "test_2bit";
  static constexpr float kDefaultZeroPoint = 2;
  static constexpr bool kZeroPoints = true;
  static float Decode(uint32_t code) { return float(code); }
};
struct four_bit_table : formats::FormatBase<four_bit_table, 4> {
  static constexpr char kName[] = "test_4bit";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static float Decode(uint32_t code) { return (code & 8 ? -1.0f : 1.0f) * float(1 << (code & 7)); }
};
struct eight_bit_table : formats::FormatBase<eight_bit_table, 8> {
  static constexpr char kName[] = "test_8bit";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static float Decode(uint32_t code) { return (float(code) - 100.5f) * float(code % 7); }
};
struct four_bit_codebook : formats::FormatBase<four_bit_codebook, 4> {
  static constexpr char kName[] = "test_book";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr bool kCodebook = true;
  static float Decode(uint32_t) { return 0; }
};
inline const bool formats_registered = RegisterFormat(DescribeFormat<two_bits>()) &&
                                       RegisterFormat(DescribeFormat<four_bit_table>()) &&
                                       RegisterFormat(DescribeFormat<four_bit_codebook>()) &&
                                       RegisterFormat(DescribeFormat<eight_bit_table>());

/// All of the expert's panels; `table` has 256 elements and must live as long.
inline GemmArgs ArgsOf(const PackedWeights& w, const CpuGemm& gemm, int64_t expert, float* table) {
  const int64_t tile = expert * w.shape.row_tiles;
  const int64_t scales =
      tile * std::max<int64_t>(w.shape.groups, 1) * 16 * int64_t(SizeOf(w.scale_dtype()));
  const auto at = [scales](const void* p) { return p ? (const uint8_t*)p + scales : nullptr; };
  GemmArgs args{};
  args.codes = w.codes() + tile * w.shape.tile_bytes;
  args.block_scales = at(w.block_scales());
  args.zero_offsets = at(w.zero_offsets());
  args.row_scales = w.row_scales() + tile * 16;
  args.bias = w.bias() ? w.bias() + tile * 16 : nullptr;
  args.half_scales = w.scale_dtype() == DType::kFloat16;
  args.panels = w.shape.row_tiles;
  args.k_padded = w.shape.k_padded;
  args.block_size = w.header.block_size;
  for (int i = 0; i < 256; ++i)
    table[i] = w.codebook() ? w.codebook()[i % (1 << GetFormat(w.header.FormatName()).bits)]
                            : gemm.table[i];
  args.table = table;
  return args;
}

/// Whether the kernel is for accuracy_level 3 or 4.
inline bool RoundsActivations(const Kernel& kernel) { return !kernel.refuse({.n = 64}).empty(); }

/// Rows of floats as the kernel reads them; `row_bytes` becomes the bytes from one to the next.
inline std::vector<uint8_t> StoredRows(const GemmKernel& gemm, const std::vector<float>& x,
                                       int64_t k_padded, int64_t& row_bytes) {
  const int64_t rows = int64_t(x.size()) / k_padded;
  const cpu::TileSize tiles = gemm.TileSizeOf(k_padded);
  row_bytes = tiles.of_row;
  // Rows of a tile that there are not have numbers, too.
  std::vector<uint8_t> stored(gemm.in_tiles ? tiles.StoredBytes(rows) : rows * row_bytes, 0xff);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = &x[r * k_padded];
    if (gemm.in_tiles)
      gemm.store(from, 0, k_padded, tiles.RowAt(stored.data(), rows, r));
    else if (gemm.store)
      gemm.store(from, 0, k_padded, {&stored[r * row_bytes]});
    else
      std::memcpy(&stored[r * row_bytes], from, k_padded * 4);
  }
  return stored;
}

/// Whether two results are the same bits; any NaN is the same as any other.
inline bool SameBits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (std::memcmp(a + i, b + i, sizeof *a) != 0 && !(std::isnan(a[i]) && std::isnan(b[i])))
      return false;
  return true;
}

/// Of those, whether it rounds them to int8.
inline bool IsInt8(const Kernel& kernel) {
  return RoundsActivations(kernel) && kernel.refuse({.n = 64, .accuracy_level = 3}) != "";
}

/// `all` are the results of args for rows x[rows, k_padded] of floats: the same rows in smaller
/// batches, and picked by an index, must have the same bits.
inline void ExpectSameRows(GemmArgs args, const GemmKernel& gemm, const std::vector<float>& x,
                           const std::vector<float>& all, const std::string& what) {
  const int64_t rows = args.rows, columns = args.ldy, k = args.k_padded;
  std::vector<int32_t> index(rows);
  for (int32_t& i : index) i = int32_t(rng() % unsigned(rows));
  std::vector<float> part(all.size());
  const int64_t most = std::min<int64_t>(rows, quick ? 9 : 14);
  const void* const stored = args.x;
  for (int64_t m = 1; m <= most; ++m) {
    std::vector<float> first(x.begin(), x.begin() + m * k), picked;
    for (int64_t r = 0; r < m; ++r)
      picked.insert(picked.end(), &x[index[r] * k], &x[index[r] * k] + k);
    std::vector<uint8_t> tiles;
    if (gemm.in_tiles) tiles = StoredRows(gemm, first, k, args.row_bytes);
    args.x = gemm.in_tiles ? tiles.data() : stored;
    args.rows = m;
    args.y = part.data();
    args.row_index = nullptr;
    gemm.gemm(args);
    EXPECT(SameBits(part.data(), all.data(), m * columns), what, ": ", m,
           " rows give other bits than ", rows);
    if (gemm.in_tiles)
      tiles = StoredRows(gemm, picked, k, args.row_bytes), args.x = tiles.data();
    else
      args.row_index = index.data();
    gemm.gemm(args);
    for (int64_t r = 0; r < m; ++r)
      EXPECT(SameBits(&part[r * columns], &all[index[r] * columns], columns), what,
             ": wrong row by index");
  }
}

}  // namespace qmoe_plugin
