// The exact CPU kernels against double loops over what the RowReader delivers: every format,
// instruction set, block size, scale and zero point type, with tails in rows, columns and K. That
// results have the same bits whatever the batch, and those of AVX2 and AVX-512 whichever it is.
// Activations and conversions.
#include <cstdlib>
#include <cstring>

#include "tests/cpp/emulated/kernels.h"
#include "tests/cpp/gemm_testing.h"

using namespace qmoe_plugin;

namespace {

/// Every kernel of the shape's format, for row counts up to 30.
void TestKernels(const Shape& shape) {
  const Weights weights(shape);
  const RowReader reader(weights.projection);
  const std::vector<double> w = Dequantize(reader);
  const PackedWeights packed =
      PackToHost(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat16IfExact);
  const int64_t rows = quick ? 13 : 30, kp = packed.shape.k_padded,
                columns = packed.shape.row_tiles * 16;
  std::vector<float> x(rows * kp);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < shape.k; ++k) x[r * kp + k] = Gauss();

  const int64_t expert = shape.experts - 1;
  std::vector<float> simd;  // all rows at once by the first SIMD kernel
  for (const Kernel* kernel : CpuKernels(shape.format)) {
    if (RoundsActivations(*kernel)) continue;  // test_cpu_levels.cc
    const CpuGemm& cpu = *static_cast<const CpuGemm*>(kernel->launch);
    const GemmKernel& gemm = cpu.For(shape.block);
    const std::string what = kernel->name + ": " + shape.Describe();
    float table[256];
    GemmArgs args = ArgsOf(packed, cpu, expert, table);
    std::vector<float> all(rows * columns);
    const std::vector<uint8_t> stored = StoredRows(gemm, x, kp, args.row_bytes);
    args.x = stored.data();
    args.ldy = columns;
    args.rows = rows;
    args.y = all.data();
    gemm.gemm(args);
    double worst = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < shape.n; ++n) {
        const Reference ref = Dot(&w[(expert * shape.n + n) * shape.k], &x[r * kp], shape.k);
        const double bias = reader.Bias(expert, n);
        const double error = std::fabs(all[r * columns + n] - ref.value - bias);
        worst = std::max(worst, error / (ref.magnitude + std::fabs(bias) + 1e-30));
      }
    }
    EXPECT(worst < 1e-6, what, ": error ", worst, " of the sum of magnitudes");
    const bool is_reference = cpu.isa == &kCpuReference;
    if (!is_reference || !quick) ExpectSameRows(args, gemm, x, all, what);
    if (is_reference || gemm.store) continue;
    if (simd.empty()) simd = all;
    EXPECT(std::memcmp(simd.data(), all.data(), all.size() * 4) == 0, what,
           ": other bits than the other vector width");
  }
}

void TestAllKernels() {
  for (const Format* format : Formats()) {
    EXPECT(!CpuKernels(format).empty(), "no CPU kernel for ", format->name);
    for (int64_t block : {0, 16, 32, 64, 128, 256}) {
      if ((format->plain() && block) || (quick && (block == 64 || block == 128))) continue;
      std::vector<ZeroPoints> kinds = {ZeroPoints::kNone};
      if (format->zero_points) kinds = {ZeroPoints::kNone, ZeroPoints::kPacked, ZeroPoints::kFloat};
      for (ZeroPoints kind : kinds) {
        TestKernels({format, 1, 16, std::max<int64_t>(block, 32), block, DType::kFloat16, kind});
        TestKernels({format, 2, 37, 512, block, DType::kFloat32, kind, true});
        TestKernels({format, 1, 145, 200, block, DType::kBFloat16, kind, true});
        TestKernels({format, 1, 5, 8, block, DType::kFloat16, kind});
      }
    }
    TestKernels({format, 1, 64, 2880, 0, DType::kFloat16});
  }
}

/// Rows with one number that is large, small, odd or not finite.
void TestOddValues(const char* format) {
  const Shape shape{&GetFormat(format), 1, 80, 64, 32};
  const Weights weights(shape);
  const RowReader reader(weights.projection);
  const std::vector<double> w = Dequantize(reader);
  const PackedWeights packed =
      PackToHost(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat16IfExact);
  constexpr float kOdd[] = {1e30f, 1.2345678f, -7e-20f, 3e-39f, INFINITY, -INFINITY, NAN};
  constexpr int64_t kCount = std::size(kOdd), kPlace = 37;
  std::vector<float> x(kCount * shape.k);
  for (int64_t r = 0; r < kCount; ++r) x[r * shape.k + kPlace] = kOdd[r];
  for (const Kernel* kernel : CpuKernels(shape.format)) {
    if (RoundsActivations(*kernel)) continue;
    const CpuGemm& cpu = *static_cast<const CpuGemm*>(kernel->launch);
    const GemmKernel& gemm = cpu.For(shape.block);
    float table[256];
    GemmArgs args = ArgsOf(packed, cpu, 0, table);
    const std::vector<uint8_t> stored = StoredRows(gemm, x, shape.k, args.row_bytes);
    std::vector<float> y(kCount * shape.n);
    args.x = stored.data();
    args.ldy = shape.n;
    args.rows = kCount;
    args.y = y.data();
    gemm.gemm(args);
    for (int64_t r = 0; r < kCount; ++r) {
      for (int64_t n = 0; n < shape.n; ++n) {
        const double expected = w[n * shape.k + kPlace] * kOdd[r], got = y[r * shape.n + n];
        const bool right = std::isfinite(expected)
                               ? std::fabs(got - expected) <= 3e-7 * std::fabs(expected) + 1e-36
                           : std::isnan(expected) ? std::isnan(got)
                                                  : got == expected;
        EXPECT(right, kernel->name, ": ", kOdd[r], " times ", w[n * shape.k + kPlace], " gives ",
               got);
      }
    }
    ExpectSameRows(args, gemm, x, y, kernel->name);
  }
}

/// Any number of rows, which kernels cut into tiles in different ways.
void TestRowCounts() {
  const Shape shape{&GetFormat("int4"), 1, 40, 288, 32, DType::kFloat16, ZeroPoints::kPacked, true};
  const Weights weights(shape);
  const PackedWeights packed = PackToHost(RowReader(weights.projection), false, Layout::kCpuPanel16,
                                          ScalePolicy::kFloat16IfExact);
  const int64_t rows = 200, kp = packed.shape.k_padded, columns = packed.shape.row_tiles * 16;
  std::vector<float> x(rows * kp);
  for (float& value : x) value = Gauss();
  for (const Kernel* kernel : CpuKernels(shape.format)) {
    const CpuGemm& cpu = *static_cast<const CpuGemm*>(kernel->launch);
    const GemmKernel& gemm = cpu.For(shape.block);
    float table[256];
    GemmArgs args = ArgsOf(packed, cpu, 0, table);
    std::vector<uint8_t> stored;
    const auto store = [&](int64_t first, int64_t count) {
      const std::vector<float> part(&x[first * kp], &x[first * kp] + count * kp);
      stored = StoredRows(gemm, part, kp, args.row_bytes);
      args.x = stored.data();
      args.rows = count;
    };
    std::vector<float> single(rows * columns);
    args.ldy = columns;
    for (int64_t r = 0; r < rows; ++r) {
      store(r, 1);
      args.y = &single[r * columns];
      gemm.gemm(args);
    }
    for (int64_t count = 1; count <= rows; count += count < 40 ? 1 : 7) {
      store(0, count);
      std::vector<float> y((count + 1) * columns, 77.0f);
      args.y = y.data();
      gemm.gemm(args);
      EXPECT(SameBits(y.data(), single.data(), count * columns), kernel->name, ": ", count,
             " rows give other bits than one");
      EXPECT(y[count * columns] == 77, kernel->name, " wrote behind ", count, " rows");
    }
  }
}

/// Relative errors over a grid; of tails below 1e-4, what they are off by counts.
void TestActivations() {
  for (const CpuIsa* isa : Isas()) {
    for (const auto& [a, limit_after] : {std::pair{Activation::kIdentity, false},
                                         {Activation::kRelu, false},
                                         {Activation::kGelu, false},
                                         {Activation::kSilu, false},
                                         {Activation::kSwiglu, false},
                                         {Activation::kSwiglu, true},
                                         {Activation::kGeglu, false}}) {
      const ActivationParams params = SomeParams(a, limit_after);
      const int64_t n = quick ? 20003 : 200003;  // not a multiple of any vector
      const int64_t per_value = IsGated(a) ? 2 : 1;
      std::vector<float> x(n * per_value), y(n);
      for (int64_t i = 0; i < n; ++i) {
        x[i * per_value] = float(i - n / 2) * (24.0f / float(n));  // -12 to 12
        if (per_value == 2) x[2 * i + 1] = 3 * Gauss();
      }
      isa->activate(params, x.data(), n, y.data());
      double worst = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double gate = x[i * per_value], up = per_value == 2 ? x[2 * i + 1] : 0;
        const double exact = Activated(params, gate, up);
        worst = std::max(worst, std::fabs(y[i] - exact) / (std::fabs(exact) + 1e-4));
      }
      EXPECT(worst < 1.5e-6, isa->name, ": activation ", int(a), " is off by ", worst);
      for (int64_t count : {1, 3, 7, 8, 9, 15, 16, 17, 31}) {
        std::vector<float> part(count + 1, 77.0f);
        isa->activate(params, x.data(), count, part.data());
        EXPECT(std::memcmp(part.data(), y.data(), count * 4) == 0 && part[count] == 77, isa->name,
               ": activation ", int(a), " of ", count, " values");
      }
      const float odd[] = {NAN, 1, -200, 1, 200, 1, INFINITY, 1};
      float out[8];
      isa->activate(params, odd, 8 / per_value, out);
      EXPECT(std::isnan(out[0]), isa->name, ": activation ", int(a), " of NaN is ", out[0]);
      EXPECT(
          std::isfinite(out[per_value == 2 ? 1 : 2]) && std::isfinite(out[per_value == 2 ? 2 : 4]),
          isa->name, ": activation ", int(a), " of -200 or 200 is not finite");
    }
  }
}

void TestConversions() {
  for (const CpuIsa* isa : Isas()) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      std::vector<uint16_t> all(65536), back(65536);
      for (uint32_t i = 0; i < 65536; ++i) all[i] = uint16_t(i);
      std::vector<float> x(65536);
      isa->to_float(all.data(), dtype, 65536, x.data());
      isa->from_float(x.data(), 65536, dtype, back.data());
      for (uint32_t i = 0; i < 65536; ++i) {
        const float expected = LoadFloat(all.data(), dtype, i);
        if (std::isnan(expected)) {
          EXPECT(std::isnan(x[i]) && std::isnan(LoadFloat(back.data(), dtype, i)), isa->name,
                 ": NaN ", i);
        } else {
          EXPECT(x[i] == expected && back[i] == i, isa->name, ": ", qmoe_plugin::Name(dtype), " ",
                 i);
        }
      }
      for (float& value : x) value = std::ldexp(Gauss(), int(rng() % 60) - 40);
      isa->from_float(x.data(), 65531, dtype, back.data());
      for (uint32_t i = 0; i < 65531; ++i) {
        const uint16_t expected =
            dtype == DType::kFloat16 ? FloatToHalf(x[i]) : FloatToBFloat16(x[i]);
        EXPECT(back[i] == expected, isa->name, ": rounding ", x[i], " to ",
               qmoe_plugin::Name(dtype));
      }
    }
  }
}
}  // namespace

int main(int argc, char** argv) {
  ReadArguments(argc, argv);
  unsetenv("QMOE_PLUGIN_CPU_ISA");
  RegisterEmulatedKernels(-1000);
  TestAllKernels();
  TestRowCounts();
  for (const char* format : {"int2", "int4", "int8", "fp8_e4m3"}) TestOddValues(format);
  TestActivations();
  TestConversions();
  std::printf("%d checks, %d failures; kernels of int4:", checks, failures);
  for (const Kernel* kernel : CpuKernels(&GetFormat("int4")))
    std::printf(" %s", kernel->stem.c_str());
  std::printf("\n");
  return failures != 0;
}
