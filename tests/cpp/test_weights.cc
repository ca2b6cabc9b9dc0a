// RowReader against values worked out by hand, and Pack against RowReader.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "ops/error.h"
#include "ops/pack.h"
#include "ops/weights.h"

namespace {

using namespace qmoe_plugin;

int failures = 0;

void Expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

void ExpectError(const std::function<void()>& body, const char* part) {
  try {
    body();
  } catch (const Error& error) {
    Expect(std::strstr(error.what(), part) != nullptr,
           Concat("message '", error.what(), "' should contain '", part, "'"));
    return;
  }
  Expect(false, Concat("no error where '", part, "' was expected"));
}

template <class T>
TensorView View(const std::vector<T>& data, DType dtype, std::vector<int64_t> shape) {
  return {data.data(), dtype, std::move(shape), true};
}

/// A projection with owned tensors: codes count 0, 1, 2, ... (mod 16) and scales 1, 2, 3, ...
struct Owned {
  Projection p;
  std::vector<uint8_t> codes, zero_points;
  std::vector<float> scales;

  Owned(int64_t experts, int64_t n, int64_t k, int64_t block_size) {
    p.name = "fc1";
    p.format = &GetFormat("int4");
    p.experts = experts;
    p.n = n;
    p.k = k;
    p.block_size = block_size;
    const int64_t row_bytes = (block_size ? p.groups() * block_size : k) / 2;
    codes.resize(size_t(experts * n * row_bytes));
    for (size_t i = 0; i < codes.size(); ++i)
      codes[i] = uint8_t((2 * i % 16) | (((2 * i + 1) % 16) << 4));
    scales.resize(size_t(experts * n * p.groups()));
    std::iota(scales.begin(), scales.end(), 1.0f);
    p.codes = View(codes, DType::kUint8, {experts, n, row_bytes});
    p.scales = View(scales, DType::kFloat32, {experts, n, p.groups()});
  }
};

void TestPlainRows() {
  Owned w(2, 3, 32, 16);
  const RowReader reader(w.p);
  std::vector<uint8_t> codes(32);
  reader.Codes(1, 2, codes.data());
  Expect(codes[0] == 0 && codes[5] == 5 && codes[31] == 15, "codes of a plain row");
  float scales[2];
  reader.Scales(1, 2, scales);
  Expect(scales[0] == 11 && scales[1] == 12, "scales of the last row");
  Expect(!reader.has_zero_points() && !reader.has_bias() && reader.Bias(0, 0) == 0,
         "absent inputs");
}

/// Scales by their type: bfloat16 holds what is bfloat16, e8m0 or e4m3, times a power of two.
void TestShortFactors() {
  Owned w(2, 3, 32, 16);
  Expect(!RowReader(w.p).has_short_factors(), "float32 scales are long");
  const std::vector<uint16_t> bfloat16(12, 0x3f80);
  w.p.scales = View(bfloat16, DType::kBFloat16, {2, 3, 2});
  Expect(RowReader(w.p).has_short_factors(), "bfloat16 scales are short");
  Format fine = GetFormat("int4");
  fine.centered[5] = 0.1f;
  w.p.format = &fine;
  Expect(!RowReader(w.p).has_short_factors(), "0.1 has more bits");
  Owned channel(2, 3, 32, 0);
  Expect(RowReader(channel.p).has_short_factors(), "there are no block scales to be long");
  Owned fp4(2, 3, 32, 32);
  const std::vector<uint8_t> e8m0(6, 127);
  fp4.p.format = &GetFormat("mxfp4");
  fp4.p.scales = View(e8m0, DType::kFloat8E8M0, {2, 3, 1});
  std::vector<float> global = {0.5f, 4.0f};
  fp4.p.global_scale = View(global, DType::kFloat32, {2});
  Expect(RowReader(fp4.p).has_short_factors(), "times powers of two");
  global[1] = 3;
  Expect(!RowReader(fp4.p).has_short_factors(), "times 3");
}

/// Float16 has bits for 2^-11 times each scale: those of a row are within 128 of each other, or round.
void TestCoarseScales() {
  const auto coarse = [](float first, float second, bool zero_points = false) {
    Owned w(1, 2, 32, 16);
    w.scales[0] = first, w.scales[1] = second;
    w.zero_points = {0x88, 0x88};
    if (zero_points) w.p.zero_points = View(w.zero_points, DType::kUint8, {1, 2, 1});
    const RowReader reader(w.p);
    return (PlanPack(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat16).flags &
            PackedHeader::kCoarseScales) != 0;
  };
  Expect(coarse(1, 0), "no scale is small, but a zero");
  Expect(coarse(0.7f, -0.7f / 128), "by 128, rounded to float16");
  Expect(coarse(0x1p-30f, 0x1p-40f), "by 1024, but powers of two");
  Expect(!coarse(1, 1.001f / 1024), "by 1024");
  Expect(!coarse(1.001f / 1024, -1), "in any order");
  Expect(!coarse(1, 0, true), "with zero points it does not matter");
}

void TestRowOrders() {
  Owned halves(1, 6, 16, 16);
  const RowReader reader(halves.p, RowOrder::kHalves);
  float scale;
  const float expected[] = {1, 4, 2, 5, 3, 6};  // gate_0 up_0 gate_1 up_1 ...
  for (int row = 0; row < 6; ++row) {
    reader.Scales(0, row, &scale);
    Expect(scale == expected[row], Concat("row ", row, " of halves"));
  }
  Owned gate(1, 2, 16, 16), up(1, 2, 16, 16);
  for (float& s : up.scales) s += 10;
  const RowReader two(gate.p, up.p);
  Expect(two.rows() == 4, "rows of gate and up together");
  const float expected_two[] = {1, 11, 2, 12};
  for (int row = 0; row < 4; ++row) {
    two.Scales(0, row, &scale);
    Expect(scale == expected_two[row], Concat("row ", row, " of two matrices"));
  }
}

void TestZeroPoints() {
  Owned w(1, 2, 48, 16);  // 3 blocks: 2 bytes of packed zero points a row
  w.zero_points = {0x21, 0x03, 0x65, 0x07};
  w.p.zero_points = View(w.zero_points, DType::kUint8, {1, 2, 2});
  float offsets[3];
  RowReader(w.p).ZeroOffsets(0, 1, offsets);
  Expect(offsets[0] == 3 && offsets[1] == 2 && offsets[2] == 1, "8 - packed zero points");
  std::vector<float> typed{1.5f, 8, 0, 4, 5, 6};
  w.p.zero_points = View(typed, DType::kFloat32, {1, 2, 3});
  RowReader(w.p).ZeroOffsets(0, 0, offsets);
  Expect(offsets[0] == 6.5f && offsets[1] == 0 && offsets[2] == 8, "8 - typed zero points");
  Owned channel(1, 2, 16, 0);
  channel.zero_points = {0x97};
  channel.p.zero_points = View(channel.zero_points, DType::kUint8, {1, 1});
  RowReader(channel.p).ZeroOffsets(0, 1, offsets);
  Expect(offsets[0] == -1, "zero points packed across rows");
}

void TestGroupIndex() {
  Owned w(1, 1, 20,
          16);  // two blocks, the second partial; even columns in block 1, odd ones in block 0
  std::vector<int32_t> group(20);
  for (int k = 0; k < 20; ++k) group[size_t(k)] = k % 2 == 0;
  w.p.group_index = View(group, DType::kInt32, {20});
  const RowReader reader(w.p);
  Expect(reader.k() == 32 && reader.groups() == 2, "two padded blocks");
  const auto& order = reader.k_order();
  Expect(order[0] == 1 && order[9] == 19 && order[10] == -1 && order[16] == 0 && order[25] == 18,
         "k order");
  std::vector<uint8_t> codes(32);
  reader.Codes(0, 0, codes.data());
  Expect(codes[1] == 3 && codes[16] == 0 && codes[25] == 2,
         "codes in k order");  // code of column 18 is 18 % 16
  group[3] = 2;
  ExpectError([&] { RowReader{w.p}; }, "g_idx[3] is 2");
}

void TestBadInput() {
  Owned w(2, 3, 32, 16);
  Projection bad = w.p;
  bad.codes.shape = {2, 3, 15};
  ExpectError([&] { RowReader{bad}; }, "must be [2, 3, 16]");
  bad = w.p;
  bad.scales.shape = {2, 3};
  ExpectError([&] { RowReader{bad}; }, "scales have shape [2, 3]");
  bad = w.p;
  bad.block_size = 24;
  ExpectError([&] { RowReader{bad}; }, "power of two");
  w.scales[5] = std::nanf("");
  const RowReader reader(w.p);
  ExpectError([&] { PackToHost(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat32); },
              "scales must be finite");
}

void TestPackedScales() {
  Owned w(2, 20, 32, 16);
  const RowReader reader(w.p);
  for (ScalePolicy policy :
       {ScalePolicy::kFloat16, ScalePolicy::kFloat32, ScalePolicy::kFloat16IfExact}) {
    const PackedWeights packed = PackToHost(reader, false, Layout::kCpuPanel16, policy);
    CheckHeader(packed.header, Layout::kCpuPanel16, "int4");
    Expect(packed.shape.row_tiles == 2 && packed.shape.groups == 2, "packed shape");
    const TileLayout& layout = GetTileLayout(Layout::kCpuPanel16);
    for (int64_t row = 0; row < 20; ++row) {
      const size_t tile = size_t(1 * 2 + row / 16),
                   slot = size_t(layout.slot(layout.tile_row(int(row % 16), false)));
      const float factor = packed.row_scales()[tile * 16 + slot];
      float scales[2];
      reader.Scales(1, row, scales);
      for (size_t g = 0; g < 2; ++g) {
        const float stored =
            LoadFloat(packed.block_scales(), packed.scale_dtype(), (tile * 2 + g) * 16 + slot);
        Expect(stored * factor == scales[g], Concat("scale of row ", row, ", block ", g));
        Expect(stored < 32, "scale in range");
      }
    }
  }
  PackedHeader header = PlanPack(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat16);
  header.rows = 1;
  ExpectError([&] { CheckHeader(header, Layout::kCpuPanel16, "int4"); }, "damaged");
}

}  // namespace

int main() {
  TestPlainRows();
  TestShortFactors();
  TestCoarseScales();
  TestRowOrders();
  TestZeroPoints();
  TestGroupIndex();
  TestBadInput();
  TestPackedScales();
  std::printf("test_weights: %d failed\n", failures);
  return failures != 0;
}
