#include "ops/stored_layout.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "ops/error.h"

namespace qmoe_plugin {
namespace {

/// Expands a run of codes along a row, lowest bits first.
void ReadRaw(const uint8_t* packed, int64_t k, int bits, uint8_t* out) {
  if (bits == 8) {
    std::copy_n(packed, k, out);
  } else if (bits == 4) {
    for (int64_t i = 0; i < k / 2; ++i) {
      out[2 * i] = packed[i] & 0xf;
      out[2 * i + 1] = packed[i] >> 4;
    }
    if (k % 2) out[k - 1] = packed[k / 2] & 0xf;
  } else {
    const int per_byte = 8 / bits, mask = (1 << bits) - 1;
    for (int64_t i = 0; i < k; ++i)
      out[i] = uint8_t(packed[i / per_byte] >> (i % per_byte * bits) & mask);
  }
}

void ReadKMajor(const uint8_t* matrix, int64_t n, int64_t k, int bits, int64_t row, uint8_t* out) {
  const int64_t stride = n * bits / 8;
  const int shift = int(row * bits % 8), mask = (1 << bits) - 1;
  const uint8_t* column = matrix + row * bits / 8;
  for (int64_t i = 0; i < k; ++i) out[i] = uint8_t(column[i * stride] >> shift & mask);
}

/// perm[place] = k within a tile of T: step 1 of the header.
template <int T>
constexpr std::array<uint8_t, T> TilePermutation() {
  std::array<uint8_t, T> permutation{};
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < T / 4; ++r)
      permutation[T / 4 * q + r] = uint8_t(2 * q + 8 * (r / 2) + r % 2);
  return permutation;
}

template <int kBits>
void ReadFpAIntB(const uint8_t* matrix, int64_t k, int64_t row, bool interleaved, uint8_t* out) {
  constexpr int kCodes = 32 / kBits;               // in a word
  constexpr int kTile = 4 * kCodes;                // of the permutation
  constexpr int kInterleave = kBits == 4 ? 4 : 2;  // columns
  constexpr int kRun = 64 / kCodes;                // words of a column in a row
  constexpr auto kPermutation = TilePermutation<kTile>();
  const int64_t words = k / kCodes;  // of a column
  for (int64_t v = 0; v < words; ++v) {
    const int64_t at = interleaved
                           ? row / kInterleave * kInterleave * words +
                                 v / kRun * kRun * kInterleave + row % kInterleave * kRun + v % kRun
                           : row * words + v;
    uint32_t word;
    std::memcpy(&word, matrix + at * 4, sizeof word);
    for (int p = 0; p < kCodes; ++p) {
      const int place = p < kCodes / 2 ? 2 * p : 2 * (p - kCodes / 2) + 1;
      const int64_t w = v * kCodes + place;
      out[w / kTile * kTile + kPermutation[w % kTile]] =
          uint8_t(word >> (p * kBits) & ((1u << kBits) - 1));
    }
  }
}

}  // namespace

const char* Name(StoredLayout layout) {
  switch (layout) {
    case StoredLayout::kRaw:
      return "raw";
    case StoredLayout::kKMajor:
      return "K-major";
    case StoredLayout::kFpAIntB:
      return "SM80 prepacked (fpA_intB)";
    case StoredLayout::kFpAIntB90:
      return "SM90 prepacked (fpA_intB)";
  }
  return "unknown";
}

std::string RefuseStoredLayout(StoredLayout layout, int64_t n, int64_t k, int bits) {
  switch (layout) {
    case StoredLayout::kRaw:
      return "";
    case StoredLayout::kKMajor:
      return n * bits % 8 == 0
                 ? ""
                 : Concat("rows of ", n, " codes of ", bits, " bits do not fill bytes");
    case StoredLayout::kFpAIntB:
    case StoredLayout::kFpAIntB90:
      break;
  }
  if (bits != 4 && bits != 8)
    return Concat("it holds 4-bit and 8-bit codes, not ", bits, "-bit ones");
  const int columns = bits == 4 ? 32 : 16;
  if (k % 64 != 0 || n % columns != 0)
    return Concat("it needs a multiple of 64 columns and of ", columns, " rows, not ", n, " x ", k);
  return "";
}

void ReadStoredRow(StoredLayout layout, const uint8_t* matrix, int64_t n, int64_t k, int bits,
                   int64_t row_bytes, int64_t row, uint8_t* out) {
  switch (layout) {
    case StoredLayout::kRaw:
      return ReadRaw(matrix + row * row_bytes, k, bits, out);
    case StoredLayout::kKMajor:
      return ReadKMajor(matrix, n, k, bits, row, out);
    case StoredLayout::kFpAIntB:
    case StoredLayout::kFpAIntB90: {
      const bool interleaved = layout == StoredLayout::kFpAIntB;
      return bits == 4 ? ReadFpAIntB<4>(matrix, k, row, interleaved, out)
                       : ReadFpAIntB<8>(matrix, k, row, interleaved, out);
    }
  }
}

}  // namespace qmoe_plugin
