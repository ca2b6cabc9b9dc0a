#include "ops/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops/error.h"
#include "ops/threads.h"

namespace qmoe_plugin {
namespace {

int64_t PackedBytes(int bits, int64_t k) { return (k * bits + 7) / 8; }

void PackRow(int bits, int64_t k, const uint8_t* codes, uint8_t* packed) {
  std::memset(packed, 0, size_t(PackedBytes(bits, k)));
  for (int64_t i = 0; i < k; ++i) packed[i * bits / 8] |= uint8_t(codes[i] << (i * bits % 8));
}

void UnpackRow(int bits, int64_t k, const uint8_t* packed, uint8_t* codes) {
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < k; ++i)
    codes[i] = uint8_t((packed[i * bits / 8] >> (i * bits % 8)) & mask);
}

/// A format's values, ready for nearest-value search.
class Encoder {
 public:
  explicit Encoder(const Format& format) : levels_(1 << format.bits) {
    values_.resize(size_t(levels_));
    for (int code = 0; code < levels_; ++code)
      values_[code] = double(format.centered[code]) + double(format.default_zero_point);
    for (int code = 0; code < levels_; ++code) is_integer_ = is_integer_ && values_[code] == code;
    for (int code = 0; code < levels_; ++code)
      if (values_[code] == values_[code]) order_.push_back(code);  // NaN is never chosen
    const auto less = [this](int a, int b) { return values_[a] < values_[b]; };
    std::stable_sort(order_.begin(), order_.end(), less);
    const auto same = [this](int a, int b) { return values_[a] == values_[b]; };
    order_.erase(std::unique(order_.begin(), order_.end(), same), order_.end());  // 0 before -0
    lowest_ = format.centered[order_.front()];
    highest_ = format.centered[order_.back()];
  }

  float lowest() const { return lowest_; }
  float highest() const { return highest_; }
  int levels() const { return levels_; }
  bool signed_scales() const { return -lowest_ > highest_; }

  /// The code whose value is nearest to weight / scale (+ zero point); of two equally near, the
  /// even one.
  uint8_t Encode(float weight, float scale, uint8_t zero_point) const {
    float wanted = scale != 0 ? weight / scale : 0.0f;
    if (is_integer_) {
      wanted += float(zero_point);
      return uint8_t(std::clamp(std::nearbyint(wanted), 0.0f, float(levels_ - 1)));
    }
    const auto at =
        std::lower_bound(order_.begin(), order_.end(), double(wanted),
                         [this](int code, double value) { return values_[code] < value; });
    const int64_t right = std::clamp<int64_t>(at - order_.begin(), 1, int64_t(order_.size()) - 1);
    const double below = wanted - values_[order_[right - 1]],
                 above = values_[order_[right]] - wanted;
    const bool take_right = above < below || (above == below && order_[right] % 2 == 0);
    return uint8_t(order_[take_right ? right : right - 1]);
  }

 private:
  int levels_;
  std::vector<double> values_;  // of each code
  std::vector<int> order_;      // codes that are numbers by value, the first of equal ones
  float lowest_ = 0, highest_ = 0;
  bool is_integer_ = true;  // codes decode to themselves
};

struct BlockScale {
  float scale;
  uint8_t zero_point;
};

BlockScale ChooseScale(const Encoder& encoder, const Format& format, bool symmetric,
                       const float* weights, int64_t count) {
  float lowest = weights[0], highest = weights[0], extreme = weights[0];
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(weights[i])) FailInvalid("weights must be finite, given ", weights[i]);
    lowest = std::min(lowest, weights[i]);
    highest = std::max(highest, weights[i]);
    if (std::fabs(weights[i]) > std::fabs(extreme)) extreme = weights[i];
  }
  if (symmetric) {
    const float scale = encoder.signed_scales() ? extreme / encoder.lowest()
                                                : std::fabs(extreme) / encoder.highest();
    return {scale, uint8_t(format.default_zero_point)};
  }
  lowest = std::min(lowest, 0.0f);
  highest = std::max(highest, 0.0f);
  const float top = float(encoder.levels() - 1), scale = (highest - lowest) / top;
  const float zero = scale != 0 ? std::nearbyint(-lowest / scale) : 0.0f;
  return {scale, uint8_t(std::clamp(zero, 0.0f, top))};
}

void RequireValues(const Format& format) {
  QMOE_REQUIRE(!format.codebook, "format ", format.name,
               " has no values of its own, the model gives them; it cannot be quantised or "
               "dequantised by its name alone");
  QMOE_REQUIRE(!format.plain(), "format ", format.name,
               " is not quantised: its weights are the numbers themselves");
}

}  // namespace

void Quantize(const Format& format, const QuantShape& shape, bool symmetric, const float* weights,
              uint8_t* codes, float* scales, uint8_t* zero_points) {
  RequireValues(format);
  if (!symmetric && !format.zero_points)
    FailInvalid("format ", format.name, " has no zero points; quantise it with symmetric=True");
  const Encoder encoder(format);
  const int64_t groups = shape.groups(), block = shape.block_size ? shape.block_size : shape.k;
  ForEachOnAllCores(shape.rows, [&](int64_t row) {
    thread_local std::vector<uint8_t> row_codes;
    row_codes.resize(size_t(shape.k));
    const float* w = weights + row * shape.k;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * block, count = std::min(block, shape.k - first);
      const BlockScale chosen = ChooseScale(encoder, format, symmetric, w + first, count);
      for (int64_t i = first; i < first + count; ++i)
        row_codes[size_t(i)] = encoder.Encode(w[i], chosen.scale, chosen.zero_point);
      scales[row * groups + g] = chosen.scale;
      zero_points[row * groups + g] = chosen.zero_point;
    }
    PackRow(format.bits, shape.k, row_codes.data(),
            codes + row * PackedBytes(format.bits, shape.k));
  });
}

void Dequantize(const Format& format, const QuantShape& shape, const uint8_t* codes,
                int64_t row_bytes, const float* scales, const float* zero_points, float* weights) {
  RequireValues(format);
  const int64_t groups = shape.groups(), block = shape.block_size ? shape.block_size : shape.k;
  ForEachOnAllCores(shape.rows, [&](int64_t row) {
    thread_local std::vector<uint8_t> row_codes;
    row_codes.resize(size_t(shape.k));
    UnpackRow(format.bits, shape.k, codes + row * row_bytes, row_codes.data());
    for (int64_t k = 0; k < shape.k; ++k) {
      const int64_t at = row * groups + k / block;
      const float offset = zero_points ? format.default_zero_point - zero_points[at] : 0.0f;
      weights[row * shape.k + k] = (format.centered[row_codes[size_t(k)]] + offset) * scales[at];
    }
  });
}

void PackCodes(int bits, int64_t rows, int64_t k, const uint8_t* codes, uint8_t* packed) {
  ForEachOnAllCores(rows, [&](int64_t row) {
    PackRow(bits, k, codes + row * k, packed + row * PackedBytes(bits, k));
  });
}

void UnpackCodes(int bits, int64_t rows, int64_t k, const uint8_t* packed, int64_t row_bytes,
                 uint8_t* codes) {
  ForEachOnAllCores(
      rows, [&](int64_t row) { UnpackRow(bits, k, packed + row * row_bytes, codes + row * k); });
}

}  // namespace qmoe_plugin
