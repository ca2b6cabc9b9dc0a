#include "ops/stored_layout.h"

#include <bit>
#include <cstring>

#include "ops/error.h"
#include "ops/pack_loops.h"

namespace qmoe_plugin {
namespace {

static_assert(std::endian::native == std::endian::little, "words are put together from bytes");

/// Code `index` of a run of packed codes, lowest bits first.
template <int kBits>
uint8_t CodeAt(const uint8_t* packed, int64_t index) {
  const int64_t bit = index * kBits;
  return uint8_t(packed[bit / 8] >> (bit % 8) & ((1 << kBits) - 1));
}

/// 8 packed codes, which are kBits bytes, as the bytes of a word.
template <int kBits>
uint64_t EightCodes(const uint8_t* packed) {
  uint64_t x = 0;
  std::memcpy(&x, packed, kBits);
  if constexpr (kBits == 4) {
    x = (x | x << 16) & 0x0000ffff0000ffffu;
    x = (x | x << 8) & 0x00ff00ff00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
  } else if constexpr (kBits == 2) {
    x = (x | x << 24) & 0x000000ff000000ffu;
    x = (x | x << 12) & 0x000f000f000f000fu;
    x = (x | x << 6) & 0x0303030303030303u;
  }
  return x;
}

template <int kBits>
void ReadRaw(const uint8_t* packed, int64_t k, uint8_t* out) {
  if constexpr (kBits == 8) {
    std::memcpy(out, packed, size_t(k));
  } else {
    const int64_t bytes = k * kBits / 8, whole = bytes * 8 / kBits;
    GetPackLoops().unpack(packed, bytes, kBits, out);
    for (int64_t i = whole; i < k; ++i) out[i] = CodeAt<kBits>(packed, i);
  }
}

/// Byte j of word i becomes byte i of word j.
void Transpose8x8(uint64_t (&words)[8]) {
  constexpr uint64_t kMasks[] = {0x00000000ffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
  for (int step = 4, m = 0; step > 0; step /= 2, ++m) {
    for (int i = 0; i < 8; ++i) {
      if (i & step) continue;
      const uint64_t swapped = ((words[i] >> 8 * step) ^ words[i + step]) & kMasks[m];
      words[i] ^= swapped << 8 * step;
      words[i + step] ^= swapped;
    }
  }
}

/// Squares of 8 k x 8 rows, as a row by itself would touch every cache line of the matrix. All rows
/// of 8 k before the next k: they share lines.
template <int kBits>
void ReadKMajor(const uint8_t* matrix, int64_t n, int64_t k, int64_t row, int count,
                uint8_t* const* out) {
  const int64_t stride = n * kBits / 8, whole_k = k / 8 * 8;
  const int whole_rows = row * kBits % 8 == 0 ? count / 8 * 8 : 0;
  for (int64_t first = 0; first < whole_k; first += 8) {
    for (int r = 0; r < whole_rows; r += 8) {
      const uint8_t* corner = matrix + first * stride + (row + r) * kBits / 8;
      uint64_t square[8];
      for (int i = 0; i < 8; ++i) square[i] = EightCodes<kBits>(corner + i * stride);
      Transpose8x8(square);
      for (int i = 0; i < 8; ++i) std::memcpy(out[r + i] + first, &square[i], sizeof square[i]);
    }
  }
  for (int r = 0; r < count; ++r)
    for (int64_t i = r < whole_rows ? whole_k : 0; i < k; ++i)
      out[r][i] = CodeAt<kBits>(matrix + i * stride, row + r);
}

/// By steps 1 and 3 of the header, word q of a tile holds in its lower half, and kCodes / 2 places
/// further in its upper half, the neighbours k = 2q + 8p and k + 1 of the tile, p = 0, 1, ...
template <int kBits>
void ReadFpAIntB(const uint8_t* matrix, int64_t k, int64_t row, bool interleaved, uint8_t* out) {
  constexpr int kCodes = 32 / kBits;               // in a word
  constexpr int kTile = 4 * kCodes;                // of the permutation: 4 words
  constexpr int kInterleave = kBits == 4 ? 4 : 2;  // columns
  constexpr int kRun = 64 / kCodes;                // words of a column in a row
  constexpr uint32_t kPair = ((1u << kBits) - 1) * 0x00010001u;
  const int64_t words = k / kCodes;  // of a column
  for (int64_t v = 0; v < words; ++v) {
    const int64_t at = interleaved
                           ? row / kInterleave * kInterleave * words +
                                 v / kRun * kRun * kInterleave + row % kInterleave * kRun + v % kRun
                           : row * words + v;
    uint32_t word;
    std::memcpy(&word, matrix + at * 4, sizeof word);
    uint8_t* const target = out + v / 4 * kTile + v % 4 * 2;
    for (int p = 0; p < kCodes / 2; ++p) {
      const uint32_t halves = word >> (p * kBits) & kPair;
      const uint16_t pair = uint16_t(halves | halves >> 8);
      std::memcpy(target + 8 * p, &pair, sizeof pair);
    }
  }
}

template <int kBits>
void ReadRows(StoredLayout layout, const uint8_t* matrix, int64_t n, int64_t k, int64_t row_bytes,
              int64_t row, int count, uint8_t* const* out) {
  if (layout == StoredLayout::kKMajor) return ReadKMajor<kBits>(matrix, n, k, row, count, out);
  for (int i = 0; i < count; ++i) {
    if (layout == StoredLayout::kRaw)
      ReadRaw<kBits>(matrix + (row + i) * row_bytes, k, out[i]);
    else if constexpr (kBits != 2)
      ReadFpAIntB<kBits>(matrix, k, row + i, layout == StoredLayout::kFpAIntB, out[i]);
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
  if (bits > 8 && layout != StoredLayout::kRaw)
    return Concat("it holds codes of up to 8 bits, not ", bits, "-bit ones");
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

void ReadStoredRows(StoredLayout layout, const uint8_t* matrix, int64_t n, int64_t k, int bits,
                    int64_t row_bytes, int64_t row, int count, uint8_t* const* out) {
  switch (bits) {
    case 2:
      return ReadRows<2>(layout, matrix, n, k, row_bytes, row, count, out);
    case 4:
      return ReadRows<4>(layout, matrix, n, k, row_bytes, row, count, out);
    case 16:
    case 32:
      for (int i = 0; i < count; ++i)
        std::memcpy(out[i], matrix + (row + i) * row_bytes, size_t(k * bits / 8));
      return;
    default:
      return ReadRows<8>(layout, matrix, n, k, row_bytes, row, count, out);
  }
}

}  // namespace qmoe_plugin
