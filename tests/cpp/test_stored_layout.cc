// Stored layouts against encoders that do what the packers of such models do, step by step, rather
// than by the index map that the decoder has.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ops/error.h"
#include "ops/stored_layout.h"
#include "ops/weights.h"
#include "tests/cpp/expect.h"

namespace qmoe_plugin {
namespace {

using Bytes = std::vector<uint8_t>;

/// Codes, one byte each, to bytes, lowest bits first; every row of `columns` codes fills up a byte.
Bytes PackRows(const Bytes& codes, int64_t columns, int bits) {
  Bytes packed;
  for (size_t row = 0; row < codes.size() / size_t(columns); ++row) {
    uint32_t pending = 0;
    int used = 0;
    for (int64_t i = 0; i < columns; ++i) {
      pending |= uint32_t(codes[row * size_t(columns) + size_t(i)]) << used;
      used += bits;
      if (used == 8 || i == columns - 1) {
        packed.push_back(uint8_t(pending));
        pending = 0, used = 0;
      }
    }
  }
  return packed;
}

/// [rows, columns] to [columns, rows].
Bytes Transposed(const Bytes& matrix, int64_t rows, int64_t columns) {
  Bytes result(matrix.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) result[c * rows + r] = matrix[r * columns + c];
  return result;
}

/// Step 1: within tiles of 32 (4 bits) or 16 (8 bits) rows of a matrix [k, n], the rows in the order
/// in which the threads of an MMA want them: rows 2q, 2q + 1 of each 8 for thread q.
Bytes PermuteRows(const Bytes& matrix, int64_t k, int64_t n, int bits) {
  const int tile = 128 / bits;
  Bytes result;
  for (int64_t first = 0; first < k; first += tile)
    for (int thread = 0; thread < 4; ++thread)
      for (int eight = 0; eight < tile / 8; ++eight)
        for (int i = 0; i < 2; ++i) {
          const uint8_t* row = &matrix[size_t((first + 8 * eight + 2 * thread + i) * n)];
          result.insert(result.end(), row, row + n);
        }
  return result;
}

/// Step 3: of columns [n, k], one after the other, `group` neighbours are laid out by turns, 64 codes
/// of each at a time.
Bytes InterleaveColumns(const Bytes& columns, int64_t n, int64_t k, int group) {
  Bytes result;
  for (int64_t first = 0; first < n; first += group)
    for (int64_t part = 0; part < k; part += 64)
      for (int c = 0; c < group; ++c) {
        const uint8_t* run = &columns[size_t((first + c) * k + part)];
        result.insert(result.end(), run, run + 64);
      }
  return result;
}

/// Step 4: the codes of each 32-bit word, even places first.
Bytes EvenPlacesFirst(const Bytes& codes, int bits) {
  const size_t word = 32 / size_t(bits);
  Bytes result;
  for (size_t first = 0; first < codes.size(); first += word)
    for (size_t odd = 0; odd < 2; ++odd)
      for (size_t i = odd; i < word; i += 2) result.push_back(codes[first + i]);
  return result;
}

/// The bytes of a matrix of codes [n, k] in a layout.
Bytes Store(StoredLayout layout, const Bytes& codes, int64_t n, int64_t k, int bits) {
  if (layout == StoredLayout::kRaw) return PackRows(codes, k, bits);
  const Bytes k_major = Transposed(codes, n, k);
  if (layout == StoredLayout::kKMajor) return PackRows(k_major, n, bits);
  Bytes columns = Transposed(PermuteRows(k_major, k, n, bits), k, n);
  if (layout == StoredLayout::kFpAIntB) columns = InterleaveColumns(columns, n, k, 16 / bits);
  return PackRows(EvenPlacesFirst(columns, bits), k, bits);
}

Bytes RandomCodes(int64_t count, int bits) {
  static std::mt19937 rng(3);
  Bytes codes(static_cast<size_t>(count));
  for (uint8_t& code : codes) code = uint8_t(rng() & ((1u << bits) - 1));
  return codes;
}

/// All rows, in runs of each length from each start that differs.
void TestMatrix(StoredLayout layout, int64_t n, int64_t k, int bits) {
  const std::string what = Concat(Name(layout), " ", bits, " bits ", n, " x ", k);
  const std::string refusal = RefuseStoredLayout(layout, n, k, bits);
  EXPECT(refusal.empty(), what, ": ", refusal);
  const Bytes codes = RandomCodes(n * k, bits), stored = Store(layout, codes, n, k, bits);
  for (int count : {1, 3, 8, 16})
    for (int64_t row = 0; row + count <= n; row += count == 1 ? 1 : 5) {
      Bytes got(size_t(count * (k + 1)), 0xee);  // a guard behind each row
      std::vector<uint8_t*> out;
      for (int i = 0; i < count; ++i) out.push_back(&got[size_t(i * (k + 1))]);
      ReadStoredRows(layout, stored.data(), n, k, bits, (k * bits + 7) / 8, row, count, out.data());
      for (int i = 0; i < count; ++i) {
        EXPECT(std::memcmp(out[i], &codes[size_t((row + i) * k)], size_t(k)) == 0, what, ": row ",
               row + i, " of ", count, " from ", row);
        EXPECT(out[i][k] == 0xee, what, ": wrote behind row ", row + i);
      }
    }
}

/// Through the reader: the tensor's shape, the expert, and gates and ups that are stored apart.
void TestReader(StoredLayout layout, RowOrder order, const char* format, bool raw_shape) {
  const int64_t experts = 2, n = 96, k = 128;
  const int bits = GetFormat(format).bits;
  const std::vector<float> scales(size_t(experts * n), 1.0f);
  Projection parts[2];
  Bytes codes[2], stored[2];
  for (int part = 0; part < 2; ++part) {
    codes[part] = RandomCodes(experts * n * k, bits);
    for (uint8_t& code : codes[part])
      if (bits == 8) code &= 0x3f;  // never NaN
    for (int64_t e = 0; e < experts; ++e) {
      const auto first = codes[part].begin() + e * n * k;
      const Bytes matrix = Store(layout, Bytes(first, first + n * k), n, k, bits);
      stored[part].insert(stored[part].end(), matrix.begin(), matrix.end());
    }
    parts[part] = {.name = "fc1",
                   .format = &GetFormat(format),
                   .experts = experts,
                   .n = n,
                   .k = k,
                   .layout = layout,
                   .codes = {stored[part].data(), DType::kUint8, {experts, k, n * bits / 8}, true},
                   .scales = {scales.data(), DType::kFloat32, {experts, n}, true}};
    if (raw_shape) parts[part].codes.shape = {experts, n, k * bits / 8};
  }
  const bool two = order == RowOrder::kTwoMatrices;
  const RowReader reader = two ? RowReader(parts[0], parts[1]) : RowReader(parts[0], order);
  for (int64_t first = 0; first < reader.rows(); first += 16) {
    Bytes got(size_t(16 * k));
    uint8_t* out[16];
    for (int i = 0; i < 16; ++i) out[i] = &got[size_t(i * k)];
    reader.Codes(1, first, 16, out);
    for (int64_t row = first; row < first + 16; ++row) {
      const int64_t source = two                          ? row / 2
                             : order == RowOrder::kHalves ? row / 2 + row % 2 * n / 2
                                                          : row;
      const Bytes& from = codes[two ? row % 2 : 0];
      EXPECT(std::memcmp(out[row - first], &from[size_t((n + source) * k)], size_t(k)) == 0,
             Name(layout), " ", format, " order ", int(order), ": row ", row);
    }
  }
}

void TestRefusals() {
  const auto refused = [](StoredLayout layout, int64_t n, int64_t k, int bits, const char* part) {
    const std::string why = RefuseStoredLayout(layout, n, k, bits);
    EXPECT(why.find(part) != std::string::npos, "'", why, "' should contain '", part, "'");
  };
  refused(StoredLayout::kKMajor, 7, 64, 4, "do not fill bytes");
  refused(StoredLayout::kFpAIntB, 64, 64, 2, "not 2-bit");
  refused(StoredLayout::kFpAIntB, 64, 96, 4, "multiple of 64 columns");
  refused(StoredLayout::kFpAIntB90, 48, 64, 4, "of 32 rows");
  refused(StoredLayout::kFpAIntB, 8, 64, 8, "of 16 rows");
}

int Main() {
  for (int bits : {2, 4, 8}) {
    for (int64_t k : {1, 7, 8, 63, 200}) TestMatrix(StoredLayout::kRaw, 21, k, bits);
    for (int64_t k : {1, 7, 8, 63, 200})
      for (int64_t n : {4, 20, 64}) TestMatrix(StoredLayout::kKMajor, n, k, bits);
  }
  for (StoredLayout layout : {StoredLayout::kFpAIntB, StoredLayout::kFpAIntB90}) {
    for (int64_t k : {64, 128, 320}) {
      for (int64_t n : {32, 96}) TestMatrix(layout, n, k, 4);
      for (int64_t n : {16, 80}) TestMatrix(layout, n, k, 8);
    }
  }
  for (RowOrder order : {RowOrder::kAsStored, RowOrder::kHalves, RowOrder::kTwoMatrices}) {
    for (const char* format : {"int2", "int4", "fp8_e4m3"}) {
      TestReader(StoredLayout::kRaw, order, format, true);
      TestReader(StoredLayout::kKMajor, order, format, false);
    }
    for (const char* format : {"int4", "int8", "mxfp4"})
      for (bool raw_shape : {false, true})
        TestReader(StoredLayout::kFpAIntB, order, format, raw_shape);
    TestReader(StoredLayout::kFpAIntB90, order, "int8", true);
  }
  TestRefusals();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

}  // namespace
}  // namespace qmoe_plugin

int main() { return qmoe_plugin::Main(); }
