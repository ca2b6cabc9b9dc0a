// What belongs to the rows of a RowReader beside their codes: scales, zero offsets, bias.
#include <algorithm>
#include <cmath>

#include "ops/error.h"
#include "ops/pack_loops.h"
#include "ops/weights.h"

namespace qmoe_plugin {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t BitsAt(const uint8_t* bytes, int64_t index, int bits) {
  const int64_t bit = index * bits;
  return (uint32_t(bytes[bit / 8]) >> (bit % 8)) & ((1u << bits) - 1);
}

}  // namespace

void RowReader::Scales(int64_t expert, int64_t row, float* out) const {
  const auto [p, stored] = Locate(row);
  const int64_t base =
      (expert * CeilDiv(p->n, p->scale_rows) + stored / p->scale_rows) * p->groups();
  const size_t first = size_t(base) * SizeOf(p->ScaleType());
  const void* const scales =
      p->scales.present ? static_cast<const uint8_t*>(p->scales.data) + first : nullptr;
  if (!scales)
    std::fill_n(out, groups_, 1.0f);
  else if (group_order_.empty())
    GetPackLoops().to_float(scales, p->ScaleType(), groups_, out);
  else
    for (int64_t group = 0; group < groups_; ++group)
      out[group] = LoadFloat(scales, p->ScaleType(), size_t(group_order_[size_t(group)]));
  const float global = p->global_scale.present
                           ? LoadFloat(p->global_scale.data, DType::kFloat32, size_t(expert))
                           : 1.0f;
  if (GetPackLoops().multiply(global, groups_, out)) return;
  const int64_t group =
      std::find_if(out, out + groups_, [](float x) { return !std::isfinite(x); }) - out;
  const int64_t source = group_order_.empty() ? group : group_order_[size_t(group)];
  FailInvalid(p->name, " scale of expert ", expert, ", row ", stored, ", block ", source, " is ",
              scales ? LoadFloat(scales, p->ScaleType(), size_t(source)) : 1.0f,
              p->global_scale.present ? Concat(" times global scale ", global) : "",
              "; scales must be finite");
}

void RowReader::ZeroOffsets(int64_t expert, int64_t row, float* out) const {
  const auto [p, stored] = Locate(row);
  const ZeroPoints kind = zero_points_[p - parts_.data()];
  const int64_t stored_groups = p->groups(), flat = expert * p->n + stored;
  const int bits = p->format->bits;
  const uint8_t* bytes = static_cast<const uint8_t*>(p->zero_points.data);
  for (int64_t group = 0; group < groups_; ++group) {
    const int64_t source = group_order_.empty() ? group : group_order_[group];
    float zero_point = p->format->default_zero_point;
    switch (kind) {
      case ZeroPoints::kNone:
        break;
      case ZeroPoints::kPackedByRow:
        zero_point = float(BitsAt(bytes + flat * CeilDiv(stored_groups * bits, 8), source, bits));
        break;
      case ZeroPoints::kPackedAcrossRows:
        zero_point = float(BitsAt(bytes + expert * CeilDiv(p->n * bits, 8), stored, bits));
        break;
      case ZeroPoints::kOneByte:
        zero_point = float(bytes[flat * stored_groups + source]);
        break;
      case ZeroPoints::kFloat:
        zero_point = LoadFloat(p->zero_points.data, p->zero_points.dtype,
                               size_t(flat * stored_groups + source));
        QMOE_REQUIRE(std::isfinite(zero_point), p->name, " zero point of expert ", expert, ", row ",
                     stored, ", block ", source, " is ", zero_point,
                     "; zero points must be finite");
        break;
    }
    out[group] = p->format->default_zero_point - zero_point;
  }
}

float RowReader::Bias(int64_t expert, int64_t row) const {
  const auto [p, stored] = Locate(row);
  if (!p->bias.present) return 0.0f;
  return LoadFloat(p->bias.data, p->bias.dtype, size_t(expert * p->n + stored));
}

float RowReader::SumScale(int64_t expert) const {
  const TensorView& scale = parts_[0].sum_scale;
  return scale.present ? LoadFloat(scale.data, scale.dtype, size_t(expert)) : 1.0f;
}

}  // namespace qmoe_plugin
