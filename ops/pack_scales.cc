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

/// Whether fits(expert, row, scratch) of all rows, on all cores. scratch: groups() numbers.
template <class Fn>
bool AllRows(const RowReader& reader, const Fn& fits) {
  const int64_t rows = reader.experts() * reader.rows();
  std::atomic<int64_t> next = 0;
  std::atomic<bool> all = true;
  const auto worker = [&] {
    std::vector<float> scratch(size_t(reader.groups()));
    for (int64_t first; all && (first = next.fetch_add(kRunRows)) < rows;)
      for (int64_t i = first; all && i < std::min(first + kRunRows, rows); ++i)
        if (!fits(i / reader.rows(), i % reader.rows(), scratch.data())) all = false;
  };
  if (rows <= kRunRows) {
    worker();  // not worth a thread
  } else {
    OnAllCores(worker);
  }
  return all;
}

}  // namespace

float RowFactor(const float* scales, int64_t groups) {
  const float largest = GetPackLoops().largest(scales, groups);
  if (largest == 0) return 1.0f;
  int exponent;
  std::frexp(largest, &exponent);  // largest in [2^(exponent-1), 2^exponent)
  return std::ldexp(1.0f, std::clamp(exponent - 1 - kScaleExponent, -126, 126));
}

bool ScalesFitHalf(const RowReader& reader) {
  const PackLoops& loops = GetPackLoops();
  const int64_t groups = reader.groups();
  return AllRows(reader, [&](int64_t expert, int64_t row, float* values) {
    if (reader.block_size()) {
      reader.Scales(expert, row, values);
      if (!loops.fit_half(values, 1 / RowFactor(values, groups), groups)) return false;
    }
    if (!reader.has_zero_points()) return true;
    reader.ZeroOffsets(expert, row, values);
    return loops.fit_half(values, 1.0f, groups);
  });
}

bool ScalesAreCoarse(const RowReader& reader) {
  constexpr float kToSubnormals =
      0x1p-11f;  // multiples of 2^-13 become those of 2^-24, float16's least
  const PackLoops& loops = GetPackLoops();
  const int64_t groups = reader.groups();
  return AllRows(reader, [&](int64_t expert, int64_t row, float* values) {
    reader.Scales(expert, row, values);
    return loops.fit_smaller_half(values, 1 / RowFactor(values, groups), kToSubnormals, groups);
  });
}

void StoreScales(const float* scales, float row_factor, int64_t groups, DType dtype, void* out) {
  const float inverse = 1 / row_factor;
  if (dtype == DType::kFloat16)
    return GetPackLoops().store_half(scales, inverse, groups, static_cast<uint16_t*>(out));
  for (int64_t g = 0; g < groups; ++g) static_cast<float*>(out)[16 * g] = scales[g] * inverse;
}

}  // namespace qmoe_plugin
