#include "ops/pack_scales.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ops/pack_loops.h"
#include "ops/threads.h"

namespace qmoe_plugin {
namespace {

/// Block scales of a row are brought into [16, 32) at their largest: 2^kScaleExponent.
constexpr int kScaleExponent = 4;
/// Rows that a core checks at a time.
constexpr int64_t kRunRows = 256;

/// One worker's part of ScalesFitHalf.
class HalfCheck {
 public:
  explicit HalfCheck(const RowReader& reader)
      : reader_(reader), loops_(GetPackLoops()), values_(size_t(reader.groups())) {}

  bool Fits(int64_t expert, int64_t row) {
    const int64_t groups = reader_.groups();
    if (reader_.block_size()) {
      reader_.Scales(expert, row, values_.data());
      const float inverse = 1 / RowFactor(values_.data(), groups);
      if (!loops_.fit_half(values_.data(), inverse, groups)) return false;
    }
    if (!reader_.has_zero_points()) return true;
    reader_.ZeroOffsets(expert, row, values_.data());
    return loops_.fit_half(values_.data(), 1.0f, groups);
  }

 private:
  const RowReader& reader_;
  const PackLoops& loops_;
  std::vector<float> values_;
};

}  // namespace

float RowFactor(const float* scales, int64_t groups) {
  const float largest = GetPackLoops().largest(scales, groups);
  if (largest == 0) return 1.0f;
  int exponent;
  std::frexp(largest, &exponent);  // largest in [2^(exponent-1), 2^exponent)
  return std::ldexp(1.0f, std::clamp(exponent - 1 - kScaleExponent, -126, 126));
}

bool ScalesFitHalf(const RowReader& reader) {
  const int64_t rows = reader.experts() * reader.rows();
  std::atomic<int64_t> next = 0;
  std::atomic<bool> fits = true;
  const auto worker = [&] {
    HalfCheck check(reader);
    for (int64_t first; fits && (first = next.fetch_add(kRunRows)) < rows;)
      for (int64_t i = first; fits && i < std::min(first + kRunRows, rows); ++i)
        if (!check.Fits(i / reader.rows(), i % reader.rows())) fits = false;
  };
  if (rows <= kRunRows) {
    worker();  // not worth a thread
  } else {
    OnAllCores(worker);
  }
  return fits;
}

void StoreScales(const float* scales, float row_factor, int64_t groups, DType dtype, void* out) {
  const float inverse = 1 / row_factor;
  if (dtype == DType::kFloat16)
    return GetPackLoops().store_half(scales, inverse, groups, static_cast<uint16_t*>(out));
  for (int64_t g = 0; g < groups; ++g) static_cast<float*>(out)[16 * g] = scales[g] * inverse;
}

}  // namespace qmoe_plugin
