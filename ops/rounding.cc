#include "ops/rounding.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/error.h"
#include "ops/threads.h"

// One more copy of a function for newer processors, where the compiler and the linker can choose at load.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define QMOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QMOE_CLONES
#endif

namespace qmoe_plugin {
namespace {

constexpr int kLanes = 16;  // as in rounding.py, which adds in the same order
// Adding and taking off 1.5 * 2^23 rounds numbers up to 2^22 to integers, ties to even.
constexpr float kRound = 12582912.0f;

/// Floats in rising order as integers in rising order.
int64_t Rank(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  return bits >= 0 ? int64_t(bits) : int64_t(std::numeric_limits<int32_t>::min()) - bits;
}

float FromRank(int64_t rank) {
  const auto bits = rank >= 0 ? int32_t(rank) : int32_t(std::numeric_limits<int32_t>::min() - rank);
  return std::bit_cast<float>(bits);
}

/// Squared errors of `count` weights of one row, added to lanes[i % kLanes].
QMOE_CLONES
void AddIntegerErrors(const float* weights, const float* importance, int64_t count, float scale,
                      float zero, float top, float* lanes) {
  float sums[kLanes];
  std::memcpy(sums, lanes, sizeof sums);
  const float divisor = scale != 0 ? scale : 1.0f, kept = scale != 0 ? 1.0f : 0.0f;
  const auto error = [&](int64_t i) {
    float code = weights[i] / divisor * kept + zero;
    code = std::min(std::max(code, 0.0f), top);
    code = (code + kRound) - kRound;
    const float difference = (code - zero) * scale - weights[i];
    return difference * difference;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (importance) {
      for (int lane = 0; lane < kLanes; ++lane)
        sums[lane] += error(i + lane) * importance[i + lane];
    } else {
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += error(i + lane);
    }
  }
  for (int lane = 0; i < count; ++i, ++lane)
    sums[lane] += importance ? error(i) * importance[i] : error(i);
  std::memcpy(lanes, sums, sizeof sums);
}

/// The same for a format whose values are not the codes.
void AddTableErrors(const Codes& codes, const float* weights, const float* importance,
                    int64_t count, float scale, float* lanes) {
  const float divisor = scale != 0 ? scale : 1.0f, kept = scale != 0 ? 1.0f : 0.0f;
  const float* ordered = codes.ordered().data();
  for (int64_t i = 0; i < count; ++i) {
    const int nearest = codes.Nearest(weights[i] / divisor * kept);
    const float difference = ordered[nearest] * scale - weights[i];
    const float squared = difference * difference;
    lanes[i % kLanes] += importance ? squared * importance[i] : squared;
  }
}

}  // namespace

Codes::Codes(const std::vector<double>& values) : values_(values) {
  while ((size_t(1) << bits_) < values.size()) ++bits_;
  QMOE_REQUIRE(bits_ > 0 && bits_ <= 8 && values.size() == size_t(1) << bits_,
               "a format has a value for each of 2, 4 to 256 codes, given ", values.size());
  std::vector<int> order;
  for (size_t code = 0; code < values.size(); ++code) {
    is_integer_ = is_integer_ && values[code] == double(code);
    if (std::isfinite(values[code])) order.push_back(int(code));
  }
  QMOE_REQUIRE(order.size() > 1, "a format needs two finite values at least");
  const auto less = [&](int a, int b) { return values[size_t(a)] < values[size_t(b)]; };
  std::stable_sort(order.begin(), order.end(), less);
  const auto same = [&](int a, int b) { return values[size_t(a)] == values[size_t(b)]; };
  order.erase(std::unique(order.begin(), order.end(), same),
              order.end());  // the first of equal ones
  for (int code : order) {
    exact_.push_back(values[size_t(code)]);
    ordered_.push_back(float(values[size_t(code)]));
    code_of_.push_back(uint8_t(code));
  }
  for (int i = 0; i + 1 < count(); ++i) {
    constexpr float kMax = std::numeric_limits<float>::max();
    int64_t low = Rank(-kMax), high = Rank(kMax);  // the first number that is nearer to i + 1
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (NearestByDefinition(FromRank(middle)) > i)
        high = middle;
      else
        low = middle + 1;
    }
    thresholds_.push_back(FromRank(low));
  }
  thresholds_.push_back(std::numeric_limits<float>::quiet_NaN());  // which no number reaches
  first_.resize(1 << 16);
  for (uint32_t upper = 0; upper < first_.size(); ++upper) {
    // The smallest number with these upper bits is the largest in magnitude if they say minus.
    const float smallest = std::bit_cast<float>(upper >> 15 ? upper << 16 | 0xffffu : upper << 16);
    const auto at = std::upper_bound(thresholds_.begin(), thresholds_.end() - 1, smallest);
    first_[upper] = smallest == smallest ? uint8_t(at - thresholds_.begin()) : 0;
  }
}

int Codes::NearestByDefinition(float wanted) const {
  const auto found = std::lower_bound(exact_.begin(), exact_.end(), double(wanted));
  const int64_t right = std::clamp<int64_t>(found - exact_.begin(), 1, int64_t(exact_.size()) - 1);
  const double below = double(wanted) - exact_[size_t(right - 1)],
               above = exact_[size_t(right)] - double(wanted);
  const bool take_right = above < below || (above == below && code_of_[size_t(right)] % 2 == 0);
  return int(take_right ? right : right - 1);
}

void RoundToCodes(const Codes& codes, const BlockShape& shape, const BlockScales& scales,
                  const float* weights, uint8_t* packed) {
  const int64_t columns = shape.block_columns(), bits = codes.bits();
  const int64_t row_bytes = (shape.k * bits + 7) / 8;
  const float top = float(codes.values().size() - 1);
  ForEachOnAllCores(shape.rows, [&](int64_t row) {
    const float* w = weights + row * shape.k;
    uint8_t* out = packed + row * row_bytes;
    std::memset(out, 0, size_t(row_bytes));
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t block = row / shape.height * columns + column;
      const float scale = scales.scales[block];
      const float zero = scales.zeros ? scales.zeros[block] : scales.default_zero;
      const int64_t end = std::min(shape.k, (column + 1) * shape.width);
      for (int64_t i = column * shape.width; i < end; ++i) {
        const float wanted = scale != 0 ? w[i] / scale : 0.0f;
        uint32_t code = 0;
        if (codes.is_integer())
          code = uint32_t(std::clamp(wanted + zero, 0.0f, top) + kRound - kRound);
        else
          code = codes.code_of()[size_t(codes.Nearest(wanted))];
        out[i * bits / 8] |= uint8_t(code << (i * bits % 8));
      }
    }
  });
}

void RoundingErrors(const Codes& codes, const BlockShape& shape, const BlockScales& scales,
                    const float* weights, const float* importance, float* errors) {
  const int64_t columns = shape.block_columns();
  const float top = float(codes.values().size() - 1);
  ForEachOnAllCores(shape.block_rows(), [&](int64_t block_row) {
    const int64_t last = std::min(shape.rows, (block_row + 1) * shape.height);
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t block = block_row * columns + column, first = column * shape.width;
      const int64_t count = std::min(shape.k, first + shape.width) - first;
      const float scale = scales.scales[block];
      const float zero = scales.zeros ? scales.zeros[block] : scales.default_zero;
      const float* weight_of = importance ? importance + first : nullptr;
      float lanes[kLanes] = {};
      for (int64_t row = block_row * shape.height; row < last; ++row) {
        const float* w = weights + row * shape.k + first;
        if (codes.is_integer())
          AddIntegerErrors(w, weight_of, count, scale, zero, top, lanes);
        else
          AddTableErrors(codes, w, weight_of, count, scale, lanes);
      }
      float sum = 0;
      for (float lane : lanes) sum += lane;
      errors[block] = sum;
    }
  });
}

}  // namespace qmoe_plugin
