#include "ops/weights.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string_view>
#include <utility>

#include "ops/error.h"
#include "ops/pack_loops.h"

namespace qmoe_plugin {
namespace {

constexpr int64_t kMaxDimension = int64_t(1) << 31;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void CheckPlain(const Projection& p) {
  const std::vector<int64_t> shape{p.experts, p.n, p.k};
  QMOE_REQUIRE(p.codes.dtype == p.format->plain_type && p.codes.shape == shape, p.name,
               " weights are ", p.codes.Describe(), "; they must be ", Name(p.format->plain_type),
               ShapeText(shape), " = [experts, rows, columns]");
  QMOE_REQUIRE(!p.scales.present && !p.global_scale.present && p.block_size == 0 &&
                   p.layout == StoredLayout::kRaw && !p.group_index.present,
               p.name, " weights are ", p.format->name,
               ", which have no scales, blocks, g_idx or prepacked layouts; leave them out");
}

void CheckCodes(const Projection& p) {
  const int bits = p.format->bits;
  const int64_t tight = CeilDiv(p.k * bits, 8);
  const int64_t padded = p.block_size ? p.groups() * p.block_size * bits / 8 : tight;
  const bool takes_float8 = std::string_view(p.format->name) == "fp8_e4m3";
  const bool float8 = p.codes.dtype == DType::kFloat8E4M3 && takes_float8;
  QMOE_REQUIRE(p.codes.dtype == DType::kUint8 || float8, p.name, " weights are ",
               Name(p.codes.dtype), "; ", p.format->name, " weights must be uint8",
               takes_float8 ? " or float8e4m3fn" : "");
  const std::string refusal = RefuseStoredLayout(p.layout, p.n, p.k, bits);
  QMOE_REQUIRE(refusal.empty(), p.name, " weights cannot be ", Name(p.layout), ": ", refusal);
  const std::vector<int64_t> raw{p.experts, p.n, tight}, raw_padded{p.experts, p.n, padded};
  const std::vector<int64_t> k_major{p.experts, p.k, CeilDiv(p.n * bits, 8)};
  const bool is_raw =
      p.codes.shape == raw || (p.layout == StoredLayout::kRaw && p.codes.shape == raw_padded);
  const bool ok = p.layout == StoredLayout::kRaw      ? is_raw
                  : p.layout == StoredLayout::kKMajor ? p.codes.shape == k_major
                                                      : is_raw || p.codes.shape == k_major;
  QMOE_REQUIRE(ok, p.name, " weights have shape ", ShapeText(p.codes.shape), "; ", Name(p.layout),
               " ", p.format->name, " weights of this node must be ",
               p.layout == StoredLayout::kRaw
                   ? ShapeText(raw) + " = [experts, rows, columns * bits / 8]"
                   : ShapeText(k_major) + " = [experts, columns, rows * bits / 8]");
}

void CheckScales(const Projection& p) {
  if (p.global_scale.present) {
    const std::vector<int64_t> shape{p.experts};
    QMOE_REQUIRE(p.global_scale.dtype == DType::kFloat32 && p.global_scale.shape == shape, p.name,
                 " global scale is ", p.global_scale.Describe(), "; it must be float32",
                 ShapeText(shape), ", one factor an expert");
    if (!p.scales.present && p.block_size == 0) return;
  }
  QMOE_REQUIRE(p.scales.present, p.name, " scales are missing; ", p.format->name,
               " weights need scales of shape [experts, rows] or [experts, rows, blocks]");
  QMOE_REQUIRE(IsScale(p.ScaleType()), p.name, " scales are ", Name(p.scales.dtype),
               "; allowed are float32, float16, bfloat16, float8e4m3fn and float8e8m0");
  const int64_t rows = CeilDiv(p.n, p.scale_rows);
  const std::vector<int64_t> with_groups{p.experts, rows, p.groups()}, per_row{p.experts, rows};
  const bool ok = p.scales.shape == with_groups || (p.groups() == 1 && p.scales.shape == per_row);
  QMOE_REQUIRE(
      ok, p.name, " scales have shape ", ShapeText(p.scales.shape), "; with ",
      p.block_size ? Concat("block_size ", p.block_size) : "one scale a row", " they must be ",
      ShapeText(with_groups),
      p.scale_rows == 1 ? " = [experts, rows, blocks]" : " = [experts, row blocks, blocks]");
}

void CheckProjection(const Projection& p) {
  QMOE_REQUIRE(p.format != nullptr, p.name, " has no weight format");
  for (int64_t dimension : {p.experts, p.n, p.k})
    QMOE_REQUIRE(dimension > 0 && dimension < kMaxDimension, p.name, " has ", p.experts,
                 " experts of ", p.n, " x ", p.k,
                 " weights; every dimension must be positive and below 2^31");
  QMOE_REQUIRE(p.block_size >= 0, p.name, " block_size is ", p.block_size,
               "; it must be 0 (one scale a row) or positive");
  const bool power_of_two = (p.block_size & (p.block_size - 1)) == 0;
  QMOE_REQUIRE(p.block_size == 0 || (power_of_two && p.block_size >= 16 && p.block_size <= 65536),
               p.name, " block_size is ", p.block_size,
               "; it must be a power of two from 16 to 65536");
  QMOE_REQUIRE(p.scale_rows == 1 || p.scale_rows == p.block_size, p.name, " shares scales among ",
               p.scale_rows, " rows; blocks are one row high, or square");
  QMOE_REQUIRE(p.codes.present, p.name, " weights are missing");
  if (p.format->plain()) {
    CheckPlain(p);
  } else {
    CheckCodes(p);
    CheckScales(p);
  }
  QMOE_REQUIRE(p.format->zero_points || !p.zero_points.present, p.name,
               " has zero points, but format ", p.format->name, " takes none; remove them");
  if (p.sum_scale.present) {
    const std::vector<int64_t> shape{p.experts};
    QMOE_REQUIRE(p.sum_scale.dtype == DType::kFloat32 && p.sum_scale.shape == shape, p.name,
                 " activation scales are ", p.sum_scale.Describe(), "; they must be float32",
                 ShapeText(shape), ", one an expert");
  }
  if (p.bias.present) {
    const std::vector<int64_t> shape{p.experts, p.n};
    QMOE_REQUIRE(IsFloat(p.bias.dtype) && p.bias.shape == shape, p.name, " bias is ",
                 p.bias.Describe(), "; it must be a float tensor of shape ", ShapeText(shape));
  }
}

}  // namespace

int64_t TensorView::elements() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
}

std::string TensorView::Describe() const { return Name(dtype) + ShapeText(shape); }

RowReader::RowReader(Projection projection, RowOrder order)
    : parts_{std::move(projection)}, order_(order) {
  const Projection& p = parts_[0];
  CheckProjection(p);
  zero_points_.push_back(ZeroPointsOf(p));
  QMOE_REQUIRE(order != RowOrder::kTwoMatrices, p.name,
               " needs a second matrix for its up projection");
  QMOE_REQUIRE(order != RowOrder::kHalves || p.n % 2 == 0, p.name, " has ", p.n,
               " rows; gates and ups together must be even in number");
  groups_ = p.groups();
  packed_k_ = p.k;
  if (p.group_index.present) BuildKOrder();
  ReadCodebook();
}

RowReader::RowReader(Projection gate, Projection up)
    : parts_{std::move(gate), std::move(up)}, order_(RowOrder::kTwoMatrices) {
  for (const Projection& p : parts_) {
    CheckProjection(p);
    zero_points_.push_back(ZeroPointsOf(p));
    QMOE_REQUIRE(!p.group_index.present, p.name, " must not have a group index");
  }
  const Projection &a = parts_[0], &b = parts_[1];
  QMOE_REQUIRE(a.format == b.format && a.experts == b.experts && a.n == b.n && a.k == b.k &&
                   a.block_size == b.block_size,
               a.name, " (", a.format->name, " ", a.experts, " x ", a.n, " x ", a.k,
               ", block_size ", a.block_size, ") and ", b.name, " (", b.format->name, " ",
               b.experts, " x ", b.n, " x ", b.k, ", block_size ", b.block_size,
               ") must have the same format and shape");
  groups_ = a.groups();
  packed_k_ = a.k;
  ReadCodebook();
}

void RowReader::ReadCodebook() {
  for (const Projection& p : parts_) {
    const TensorView& tensor = p.codebook;
    const std::vector<int64_t> shape{int64_t(1) << p.format->bits};
    QMOE_REQUIRE(tensor.present == p.format->codebook, p.name, " has ",
                 tensor.present ? "a codebook, which" : "no codebook, but", " format ",
                 p.format->name, tensor.present ? " does not take" : " needs one");
    if (!tensor.present) return;
    QMOE_REQUIRE(IsFloat(tensor.dtype) && tensor.shape == shape, p.name, " codebook is ",
                 tensor.Describe(), "; it must be a float tensor of shape ", ShapeText(shape),
                 ", the value of each code");
    std::vector<float> values;
    for (int64_t code = 0; code < shape[0]; ++code) {
      values.push_back(LoadFloat(tensor.data, tensor.dtype, size_t(code)));
      QMOE_REQUIRE(std::isfinite(values.back()), p.name, " codebook gives code ", code,
                   " the value ", values.back(), "; values must be finite");
    }
    QMOE_REQUIRE(codebook_.empty() || codebook_ == values, p.name,
                 " has another codebook than the gates; both must have the same");
    codebook_ = values;
  }
}

RowReader::ZeroPoints RowReader::ZeroPointsOf(const Projection& p) {
  const TensorView& zp = p.zero_points;
  if (!zp.present) return ZeroPoints::kNone;
  const int bits = p.format->bits;
  const int64_t groups = p.groups();
  const std::vector<int64_t> packed{p.experts, p.n, CeilDiv(groups * bits, 8)};
  const std::vector<int64_t> across{p.experts, CeilDiv(p.n * bits, 8)};
  const std::vector<int64_t> full{p.experts, p.n, groups}, row{p.experts, p.n};
  const bool is_full = zp.shape == full || (groups == 1 && zp.shape == row);
  if (IsFloat(zp.dtype) && is_full) return ZeroPoints::kFloat;
  if (zp.dtype == DType::kUint8) {
    if (zp.shape == packed) return ZeroPoints::kPackedByRow;
    if (p.block_size == 0 && zp.shape == across) return ZeroPoints::kPackedAcrossRows;
    if (is_full) return ZeroPoints::kOneByte;
  }
  FailInvalid(p.name, " zero points are ", zp.Describe(), "; allowed are uint8", ShapeText(packed),
              " (packed, lowest bits first), ",
              p.block_size ? "" : Concat("uint8", ShapeText(across), " (packed), "),
              "or uint8, float32, float16 or bfloat16 ", ShapeText(full), " (one a block)");
}

/// Sorts K by block, so that blocks are contiguous again; a block of more than block_size columns
/// becomes several with the same scale, a smaller one is padded.
void RowReader::BuildKOrder() {
  const Projection& p = parts_[0];
  const int64_t stored_groups = p.groups(), given = p.group_index.elements();
  QMOE_REQUIRE(p.group_index.dtype == DType::kInt32 && p.group_index.shape.size() == 1 &&
                   (given == p.k || given == stored_groups * p.block_size),
               p.name, " g_idx is ", p.group_index.Describe(), "; it must be int32[", p.k, "]");
  QMOE_REQUIRE(p.block_size > 0, p.name, " has a g_idx but one scale a row; remove the g_idx");
  const int32_t* group_of = static_cast<const int32_t*>(p.group_index.data);
  std::vector<std::vector<int32_t>> members(stored_groups);
  for (int64_t k = 0; k < p.k; ++k) {
    QMOE_REQUIRE(group_of[k] >= 0 && group_of[k] < stored_groups, p.name, " g_idx[", k, "] is ",
                 group_of[k], "; it must be from 0 to ", stored_groups - 1);
    members[group_of[k]].push_back(int32_t(k));
  }
  for (int64_t group = 0; group < stored_groups; ++group) {
    const auto& columns = members[group];
    k_order_.insert(k_order_.end(), columns.begin(), columns.end());
    const int64_t blocks = CeilDiv(int64_t(columns.size()), p.block_size);
    group_order_.insert(group_order_.end(), blocks, int32_t(group));
    k_order_.resize(group_order_.size() * p.block_size, -1);
  }
  groups_ = int64_t(group_order_.size());
  packed_k_ = int64_t(k_order_.size());
}

int64_t RowReader::rows() const {
  return order_ == RowOrder::kTwoMatrices ? 2 * parts_[0].n : parts_[0].n;
}

bool RowReader::has_zero_points() const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [](const Projection& p) { return p.zero_points.present; });
}

bool RowReader::has_integer_zero_points() const {
  return has_zero_points() &&
         std::none_of(zero_points_.begin(), zero_points_.end(),
                      [](ZeroPoints kind) { return kind == ZeroPoints::kFloat; });
}

bool RowReader::has_short_factors() const {
  if (!format().plain())
    for (int code = 0; code < 1 << format().bits; ++code)
      if (const float value = format().centered[code];  // of formats with NaN, none is in weights
          value == value && BFloat16ToFloat(FloatToBFloat16(value)) != value)
        return false;
  if (block_size() == 0) return true;
  return std::all_of(parts_.begin(), parts_.end(), [](const Projection& p) {
    if (const DType type = p.ScaleType(); type == DType::kFloat32 || type == DType::kFloat16)
      return false;
    if (!p.global_scale.present) return true;
    const auto* global = static_cast<const float*>(p.global_scale.data);
    return std::all_of(global, global + p.experts, [](float factor) {
      int exponent;
      return std::abs(std::frexp(factor, &exponent)) == 0.5f;  // a power of two
    });
  });
}

bool RowReader::has_bias() const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [](const Projection& p) { return p.bias.present; });
}

RowReader::Place RowReader::Locate(int64_t row) const {
  switch (order_) {
    case RowOrder::kHalves:
      return {&parts_[0], row / 2 + (row % 2) * (parts_[0].n / 2)};
    case RowOrder::kTwoMatrices:
      return {&parts_[row % 2], row / 2};
    case RowOrder::kAsStored:
      break;
  }
  return {&parts_[0], row};
}

void RowReader::Codes(int64_t expert, int64_t row, int count, uint8_t* const* out) const {
  // Gates and ups that lie apart are two runs of stored rows.
  const int runs = order_ == RowOrder::kAsStored ? 1 : 2;
  for (int run = 0; run < std::min(runs, count); ++run) {
    uint8_t* targets[kMaxRows];
    int rows = 0;
    for (int i = run; i < count; i += runs) targets[rows++] = out[i];
    const auto [p, stored] = Locate(row + run);
    const int64_t matrix_bytes = int64_t(p->codes.bytes()) / p->experts;
    ReadStoredRows(p->layout, static_cast<const uint8_t*>(p->codes.data) + expert * matrix_bytes,
                   p->n, p->k, p->format->bits, matrix_bytes / p->n, stored, rows, targets);
  }
  for (int i = 0; i < count; ++i) {
    if (!k_order_.empty()) ReorderCodes(out[i]);
    if (format().plain())
      RefuseInfinite(expert, row + i, out[i]);
    else if (format().has_nan)
      RefuseNaN(expert, row + i, out[i]);
  }
}

/// Brings the codes of a row into k_order(), in place.
void RowReader::ReorderCodes(uint8_t* codes) const {
  const std::vector<uint8_t> stored(codes, codes + parts_[0].k);
  for (size_t k = 0; k < k_order_.size(); ++k)
    codes[k] = k_order_[k] < 0 ? 0 : stored[size_t(k_order_[k])];
}

void RowReader::RefuseNaN(int64_t expert, int64_t row, const uint8_t* codes) const {
  const float* values = format().centered;
  bool found = false;
  for (int code = 0; code < 1 << format().bits; ++code)
    if (std::isnan(values[code])) found |= GetPackLoops().contains(codes, packed_k_, uint8_t(code));
  if (!found) return;
  const auto [p, stored] = Locate(row);
  for (int64_t k = 0; k < packed_k_; ++k)
    QMOE_REQUIRE(!std::isnan(values[codes[k]]), p->name, " weight of expert ", expert, ", row ",
                 stored, ", column ", k_order_.empty() ? k : k_order_[size_t(k)], " is NaN (code ",
                 int(codes[k]), "); weights must be finite");
}

void RowReader::RefuseInfinite(int64_t expert, int64_t row, const uint8_t* codes) const {
  // The exponent is all ones in infinities and NaN alone.
  const DType dtype = format().plain_type;
  const auto all_finite = [this](const auto* bits, uint32_t exponent) {
    bool found = false;
    for (int64_t k = 0; k < packed_k_; ++k) found |= (bits[k] & exponent) == exponent;
    return !found;
  };
  const bool finite = dtype == DType::kFloat32
                          ? all_finite(reinterpret_cast<const uint32_t*>(codes), 0x7f800000u)
                          : all_finite(reinterpret_cast<const uint16_t*>(codes),
                                       dtype == DType::kFloat16 ? 0x7c00u : 0x7f80u);
  if (finite) return;
  const auto [p, stored] = Locate(row);
  for (int64_t k = 0; k < packed_k_; ++k) {
    const float value = LoadFloat(codes, dtype, size_t(k));
    QMOE_REQUIRE(std::isfinite(value), p->name, " weight of expert ", expert, ", row ", stored,
                 ", column ", k, " is ", value, "; weights must be finite");
  }
}

}  // namespace qmoe_plugin
