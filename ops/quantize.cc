#include "ops/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops/error.h"
#include "ops/rounding.h"
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

struct BlockScale {
  float scale;
  uint8_t zero_point;
};

BlockScale ChooseScale(const Codes& codes, const Format& format, bool symmetric,
                       const float* weights, int64_t count) {
  float lowest = weights[0], highest = weights[0], extreme = weights[0];
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(weights[i])) FailInvalid("weights must be finite, given ", weights[i]);
    lowest = std::min(lowest, weights[i]);
    highest = std::max(highest, weights[i]);
    if (std::fabs(weights[i]) > std::fabs(extreme)) extreme = weights[i];
  }
  if (symmetric) {
    const float bottom = codes.ordered().front() - format.default_zero_point,
                top = codes.ordered().back() - format.default_zero_point;
    const float scale = -bottom > top ? extreme / bottom : std::fabs(extreme) / top;
    return {scale, uint8_t(format.default_zero_point)};
  }
  lowest = std::min(lowest, 0.0f);
  highest = std::max(highest, 0.0f);
  const float top = float(codes.values().size() - 1), scale = (highest - lowest) / top;
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
  std::vector<double> values;
  for (int code = 0; code < 1 << format.bits; ++code)
    values.push_back(double(format.centered[code]) + double(format.default_zero_point));
  const Codes nearest(values);
  const int64_t groups = shape.groups(), block = shape.block_size ? shape.block_size : shape.k;
  std::vector<float> zeros(size_t(shape.rows * groups));
  ForEachOnAllCores(shape.rows, [&](int64_t row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * block, count = std::min(block, shape.k - first);
      const float* w = weights + row * shape.k + first;
      const BlockScale chosen = ChooseScale(nearest, format, symmetric, w, count);
      scales[row * groups + g] = chosen.scale;
      zero_points[row * groups + g] = chosen.zero_point;
      zeros[size_t(row * groups + g)] = chosen.zero_point;
    }
  });
  const BlockShape blocks{shape.rows, shape.k, 1, block};
  RoundToCodes(nearest, blocks, {scales, zeros.data(), 0}, weights, codes);
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
