// Rounding weights to the codes of a format with given scales, and the error of that: what
// python/qmoe_plugin/formats/rounding.py does in numpy, to the same bits. Rows are shared out over all
// cores.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace qmoe_plugin {

/// The values of a format's codes, ready to find the nearest one.
class Codes {
 public:
  /// `values` of the 2^bits codes; NaN for codes that are no number.
  explicit Codes(const std::vector<double>& values);

  const std::vector<double>& values() const { return values_; }
  int bits() const { return bits_; }
  /// Whether codes decode to themselves, so that a zero point is a code too.
  bool is_integer() const { return is_integer_; }
  /// How many different values there are.
  int count() const { return int(ordered_.size()); }
  /// The values as float32, rising, and the code of each.
  const std::vector<float>& ordered() const { return ordered_; }
  const std::vector<uint8_t>& code_of() const { return code_of_; }
  /// The place in `ordered` of the value nearest to a number; of two equally near, that of the even
  /// code.
  int Nearest(float wanted) const {
    int at = first_[std::bit_cast<uint32_t>(wanted) >> 16];
    while (wanted >= thresholds_[size_t(at)]) ++at;
    return at;
  }

 private:
  int NearestByDefinition(float wanted) const;

  int bits_ = 0;
  bool is_integer_ = true;
  std::vector<double> values_, exact_;
  std::vector<float> ordered_;
  std::vector<float> thresholds_;  // from which number on the next value is the nearest one
  std::vector<uint8_t> code_of_;
  std::vector<uint8_t> first_;  // by the upper 16 bits of a number: where to start looking
};

/// A matrix [rows, k] in blocks of height x width weights that share a scale; the last ones may be
/// partial.
struct BlockShape {
  int64_t rows = 0, k = 0, height = 1, width = 0;

  int64_t block_rows() const { return (rows + height - 1) / height; }
  int64_t block_columns() const { return (k + width - 1) / width; }
};

/// What weights are rounded with. `scales` [block_rows, block_columns]; `zeros` likewise, only of
/// integers, null for `default_zero` everywhere.
struct BlockScales {
  const float* scales = nullptr;
  const float* zeros = nullptr;
  float default_zero = 0;
};

/// The code nearest to weight / scale (+ zero point) of each weight, [rows, ceil(k * bits / 8)], lowest
/// bits first; that of 0 where the scale is 0.
void RoundToCodes(const Codes& codes, const BlockShape& shape, const BlockScales& scales,
                  const float* weights, uint8_t* packed);

/// The sum of squared errors of each block after rounding, [block_rows, block_columns], times
/// `importance` [k] of each column; null for 1. Sums are in float32, over 16 lanes of neighbours first.
void RoundingErrors(const Codes& codes, const BlockShape& shape, const BlockScales& scales,
                    const float* weights, const float* importance, float* errors);

}  // namespace qmoe_plugin
