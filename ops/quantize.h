// Round-to-nearest quantisation on the host, the compiled twin of
// python/qmoe_plugin/formats/base.py (which specifies it; the tests compare the two bit by bit).
// Rows are independent and shared out over all cores.
#pragma once

#include <cstdint>

#include "ops/formats/format.h"

namespace qmoe_plugin {

/// A matrix [rows, k] in blocks of block_size codes along K that share a scale; 0 = one scale a
/// row. G blocks a row.
struct QuantShape {
  int64_t rows = 0, k = 0, block_size = 0;

  int64_t groups() const { return block_size ? (k + block_size - 1) / block_size : 1; }
};

/// Quantises weights [rows, k]. Symmetric formats whose lowest centered value is the largest in
/// magnitude get signed scales: the extreme weight of a block takes that code. Throws Error for
/// weights that are not finite, and for `symmetric` false in a format without zero points.
///   codes [rows, ceil(k * bits / 8)] lowest bits first; scales [rows, G]; zero_points [rows, G],
///   one byte each
void Quantize(const Format& format, const QuantShape& shape, bool symmetric, const float* weights,
              uint8_t* codes, float* scales, uint8_t* zero_points);

/// (value(code) - zero_point) * scale in float32, [rows, k]. `row_bytes` is the length of a row of
/// codes; zero_points [rows, G] may be null.
void Dequantize(const Format& format, const QuantShape& shape, const uint8_t* codes,
                int64_t row_bytes, const float* scales, const float* zero_points, float* weights);

/// Packs codes [rows, k], one byte each, to [rows, ceil(k * bits / 8)], lowest bits first; and
/// back.
void PackCodes(int bits, int64_t rows, int64_t k, const uint8_t* codes, uint8_t* packed);
void UnpackCodes(int bits, int64_t rows, int64_t k, const uint8_t* packed, int64_t row_bytes,
                 uint8_t* codes);

}  // namespace qmoe_plugin
