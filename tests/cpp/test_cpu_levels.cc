// The CPU kernels that round activations (accuracy_level 3 and 4): exact for activations that need
// no rounding; else within the bound that rounding has, and for int8 with the mean error that it
// should have, outlier channels included. The same bits whatever the batch, and int8 on every
// instruction set; what is not finite. Which kernel runs at which level.
#include <cstdlib>

#include "tests/cpp/emulated/kernels.h"
#include "tests/cpp/gemm_testing.h"

using namespace qmoe_plugin;

namespace {

int64_t Rows() { return quick ? 13 : 30; }

/// Packed weights of a shape, what they mean, and a kernel's results for rows of floats.
class Gemm {
 public:
  explicit Gemm(const Shape& shape)
      : shape_(shape),
        weights_(shape),
        reader_(weights_.projection),
        w_(Dequantize(reader_)),
        packed_(PackToHost(reader_, false, Layout::kCpuPanel16, ScalePolicy::kFloat16IfExact)) {}

  int64_t k() const { return shape_.k; }
  int64_t k_padded() const { return packed_.shape.k_padded; }
  int64_t columns() const { return packed_.shape.row_tiles * 16; }
  /// The last expert's.
  const double* w(int64_t n) const { return &w_[((shape_.experts - 1) * shape_.n + n) * shape_.k]; }
  double Bias(int64_t n) const { return reader_.Bias(shape_.experts - 1, n); }

  /// y[Rows(), columns()] of x[Rows(), k_padded()].
  std::vector<float> Run(const Kernel& kernel, const std::vector<float>& x) const {
    const CpuGemm& cpu = *static_cast<const CpuGemm*>(kernel.launch);
    const GemmKernel& gemm = cpu.For(shape_.block);
    float table[256];
    GemmArgs args = ArgsOf(packed_, cpu, shape_.experts - 1, table);
    const std::vector<uint8_t> stored = StoredRows(gemm, x, k_padded(), args.row_bytes);
    std::vector<float> y(Rows() * columns());
    args.x = stored.data();
    args.rows = Rows();
    args.ldy = columns();
    args.y = y.data();
    gemm.gemm(args);
    ExpectSameRows(args, gemm, x, y, kernel.name + ": " + shape_.Describe());
    return y;
  }

  /// f(row, column) for each result that is not padding.
  template <class Function>
  void ForEach(Function f) const {
    for (int64_t r = 0; r < Rows(); ++r)
      for (int64_t n = 0; n < shape_.n; ++n) f(r, n);
  }

 private:
  const Shape shape_;
  const Weights weights_;
  const RowReader reader_;
  const std::vector<double> w_;
  const PackedWeights packed_;
};

/// What rounding a block of activations may be off by, relative to its largest value (int8) or to
/// each value (bfloat16). A codebook's values are rounded to bfloat16, too, and by tiles those of any
/// format, times their scales.
constexpr double kInt8Half = 0.5 / 127, kBFloat16Half = 1.0 / 256;

/// Multiples of 1/128 up to 127/128, which every block reaches: neither int8 nor bfloat16 rounds
/// them.
std::vector<float> RowsOnTheGrid(const Gemm& gemm) {
  std::vector<float> x(Rows() * gemm.k_padded());
  for (int64_t r = 0; r < Rows(); ++r)
    for (int64_t k = 0; k < gemm.k(); ++k)
      x[r * gemm.k_padded() + k] = (k % 16 ? int(rng() % 255) - 127 : 127) / 128.0f;
  return x;
}

std::vector<float> RowsWithOutliers(const Gemm& gemm) {
  std::vector<float> x(Rows() * gemm.k_padded());
  for (int64_t r = 0; r < Rows(); ++r)
    for (int64_t k = 0; k < gemm.k(); ++k)
      x[r * gemm.k_padded() + k] = Gauss() * (k % 71 == 5 ? 30.0f : 1.0f);
  return x;
}

int WeightRoundings(const Shape& shape, const GemmKernel& gemm) {
  const bool scaled = shape.block || shape.zero_points != ZeroPoints::kNone;
  return int(shape.format->codebook) + int(gemm.in_tiles && scaled);
}

void TestGrid(const Gemm& gemm, const Kernel& kernel, int weight_roundings,
              const std::string& what) {
  const std::vector<float> x = RowsOnTheGrid(gemm), y = gemm.Run(kernel, x);
  double worst = 0;
  gemm.ForEach([&](int64_t r, int64_t n) {
    const Reference ref = Dot(gemm.w(n), &x[r * gemm.k_padded()], gemm.k());
    const double error = std::fabs(y[r * gemm.columns() + n] - ref.value - gemm.Bias(n));
    worst = std::max(worst, error / (ref.magnitude + std::fabs(gemm.Bias(n)) + 1e-30));
  });
  EXPECT(worst < weight_roundings * kBFloat16Half + 1e-6, what, ": error ", worst,
         " of the sum of magnitudes, with activations that need no rounding");
}

void TestRounding(const Gemm& gemm, const Kernel& kernel, int64_t block, int weight_roundings,
                  const std::string& what) {
  const std::vector<float> x = RowsWithOutliers(gemm), y = gemm.Run(kernel, x);
  double squares = 0, expected_squares = 0;
  gemm.ForEach([&](int64_t r, int64_t n) {
    const float* row = &x[r * gemm.k_padded()];
    const double* w = gemm.w(n);
    const Reference ref = Dot(w, row, gemm.k());
    double bound = 1e-6 * (ref.magnitude + std::fabs(gemm.Bias(n)));
    if (!IsInt8(kernel)) {
      bound += ref.magnitude * kBFloat16Half * (1 + 1.01 * weight_roundings);
    } else {
      for (int64_t first = 0; first < gemm.k(); first += block) {
        double largest = 0;
        const int64_t end = std::min(first + block, gemm.k());
        for (int64_t k = first; k < end; ++k)
          largest = std::max(largest, std::fabs(double(row[k])));
        for (int64_t k = first; k < end; ++k) {
          // The largest value is itself not rounded.
          const double step = std::fabs(row[k]) == largest ? 0 : 2 * kInt8Half * largest;
          bound += std::fabs(w[k]) * kInt8Half * largest;
          expected_squares += w[k] * w[k] * step * step / 12;
        }
      }
    }
    const double error = y[r * gemm.columns() + n] - ref.value - gemm.Bias(n);
    squares += error * error;
    EXPECT(std::fabs(error) <= bound, what, ": y[", r, ", ", n, "] is off by ", error,
           ", more than ", bound);
  });
  // Few values say little of a mean. The results of a row may all err alike (if its zero offsets are
  // large), so there are as few as Rows(), whose chi-squared distribution is this wide at 5 sigma.
  const double mean = std::sqrt(squares / expected_squares);
  if (IsInt8(kernel) && gemm.k() >= 200 && !quick)
    EXPECT(0.4 < mean && mean < 1.7, what, ": mean error ", mean, " times that of rounding");
}

void TestOddValues(const Gemm& gemm, const Kernel& kernel, const std::string& what) {
  std::vector<float> x(Rows() * gemm.k_padded());
  const float odd[] = {0.0f, NAN, INFINITY, -INFINITY, 1e-44f, 1e-37f, 1e30f};
  constexpr int64_t kCount = std::size(odd);
  for (int64_t r = 0; r < Rows(); ++r) x[r * gemm.k_padded() + r % gemm.k()] = odd[r % kCount];
  const std::vector<float> y = gemm.Run(kernel, x);
  gemm.ForEach([&](int64_t r, int64_t n) {
    const float value = odd[r % kCount], result = y[r * gemm.columns() + n];
    const double w = gemm.w(n)[r % gemm.k()];
    if (std::fabs(value) < 1e-36f)
      EXPECT(std::fabs(result - gemm.Bias(n)) < 1e-6, what, ": ", value, " gives ", result);
    else if (std::fabs(value) > 1e29f)
      EXPECT(!std::isfinite(value) ? !std::isfinite(result) || (w == 0 && !IsInt8(kernel))
                                   : result == 0 || std::signbit(result) == std::signbit(w * value),
             what, ": ", value, " times ", w, " gives ", result);
  });
}

void TestKernels(const Shape& shape) {
  const Gemm gemm(shape);
  std::vector<float> int8;
  const std::vector<float> x = RowsWithOutliers(gemm);
  for (const Kernel* kernel : CpuKernels(shape.format)) {
    if (!RoundsActivations(*kernel)) continue;
    const std::string what = kernel->name + ": " + shape.Describe();
    const GemmKernel& rows = static_cast<const CpuGemm*>(kernel->launch)->For(shape.block);
    const int weight_roundings = WeightRoundings(shape, rows);
    TestGrid(gemm, *kernel, weight_roundings, what);
    TestRounding(gemm, *kernel, shape.block % 32 ? 16 : 32, weight_roundings, what);
    if (!shape.bias) TestOddValues(gemm, *kernel, what);
    if (!IsInt8(*kernel)) continue;
    const std::vector<float> y = gemm.Run(*kernel, x);
    if (int8.empty()) int8 = y;
    EXPECT(std::memcmp(y.data(), int8.data(), y.size() * 4) == 0, what,
           ": other bits than the other instruction set");
  }
}

void TestAllKernels() {
  for (const Format* format : Formats()) {
    if (format->plain()) continue;
    for (int64_t block : {0, 16, 32, 64, 256}) {
      if (quick && block == 64) continue;
      std::vector<ZeroPoints> kinds = {ZeroPoints::kNone};
      if (format->zero_points) kinds = {ZeroPoints::kNone, ZeroPoints::kPacked, ZeroPoints::kFloat};
      for (ZeroPoints kind : kinds) {
        TestKernels({format, 1, 16, std::max<int64_t>(block, 32), block, DType::kFloat16, kind});
        TestKernels({format, 2, 37, 512, block, DType::kFloat32, kind, true});
        TestKernels({format, 1, 145, 200, block, DType::kBFloat16, kind, true});
        TestKernels({format, 1, 5, 8, block, DType::kFloat16, kind});
      }
    }
  }
}

bool Available(const char* name) {
  for (const Kernel* kernel : Kernels())
    if (kernel->name == name) return kernel->available();
  return false;
}

/// The kernel that runs, with QMOE_PLUGIN_CPU_ISA as given; null leaves it unset.
std::string Selected(const char* isa, const char* format, int level, int64_t n = 64) {
  if (isa) setenv("QMOE_PLUGIN_CPU_ISA", isa, 1);
  const std::string name =
      Select(Device{},
             {.format = &GetFormat(format), .n = n, .block_size = 32, .accuracy_level = level})
          .name;
  unsetenv("QMOE_PLUGIN_CPU_ISA");
  return name;
}

/// Which kernels each level allows, by what the environment variable leaves.
#if defined(__aarch64__)
void TestSelection() {
  const bool i8mm = Available("gemm_neon_i8mm.int4");
  const bool dotprod = Available("gemm_neon_dotprod.int4");
  EXPECT(dotprod || !i8mm, "the kernel for I8MM uses dot products");
  for (const char* isa : {"neon", "neon_dotprod", "neon_i8mm"}) {
    for (int level : {0, 1, 2, 3})
      EXPECT(Selected(isa, "int8", level) == "gemm_neon.int8", isa, " at level ", level);
    EXPECT(Selected(isa, "int4", 4, 48) == "gemm_neon.int4", isa, ", few columns");
    EXPECT(Selected(isa, "fp8_e4m3", 4) == "gemm_neon.fp8_e4m3", isa, ", no whole numbers");
    EXPECT(Selected(isa, "float32", 4) == "gemm_neon.float32", isa, ", plain formats stay exact");
  }
  const std::string one = dotprod ? "gemm_neon_dotprod" : "gemm_neon";
  for (const std::string format : {"int2", "int4", "int8", "mxfp4", "nvfp4"}) {
    const auto selected = [&](const char* isa) { return Selected(isa, format.c_str(), 4); };
    EXPECT(selected("reference") == "gemm_reference." + format, "reference ", format);
    EXPECT(selected("neon") == "gemm_neon." + format, "neon ", format);
    EXPECT(selected("neon_dotprod") == one + "." + format, "neon_dotprod ", format);
    const std::string best = i8mm ? "gemm_neon_i8mm" : one;
    EXPECT(selected("neon_i8mm") == best + "." + format, "neon_i8mm ", format);
    EXPECT(selected(nullptr) == best + "." + format, format);
  }
}
#else
void TestSelection() {
  if (!Available("gemm_avx512_vnni.int4")) return;
  for (int level : {0, 1, 2}) {
    EXPECT(Selected("avx512", "int8", level) == "gemm_avx512.int8", "level ", level);
    EXPECT(Selected("avx2", "int4", level) == "gemm_avx2.int4", "level ", level);
  }
  EXPECT(Selected("avx512", "int8", 4) == "gemm_avx512_vnni.int8", "level 4");
  EXPECT(Selected("avx512", "int8", 4, 48) == "gemm_avx512.int8", "few columns");
  EXPECT(Selected("avx512", "mxfp4", 4) == "gemm_avx512_vnni.mxfp4", "halves");
  EXPECT(Selected("avx512", "float32", 4) == "gemm_avx512.float32", "plain formats stay exact");
  EXPECT(Selected("avx2", "int4", 3) == "gemm_avx2.int4", "AVX2 has no bfloat16");
  EXPECT(Selected("avx2", "int4", 4) == "gemm_avx2_int8.int4", "AVX2");
  EXPECT(Selected("avx2", "int8", 4) == "gemm_avx2.int8", "AVX2, 8 bits");
  EXPECT(Selected("reference", "int4", 4) == "gemm_reference.int4", "reference");
  const bool avxvnni = Available("gemm_avxvnni.int4");
  EXPECT(Selected("avxvnni", "int4", 4) == (avxvnni ? "gemm_avxvnni.int4" : "gemm_avx2_int8.int4"),
         "AVX-VNNI");
  EXPECT(Selected("avxvnni", "int8", 4) == (avxvnni ? "gemm_avxvnni.int8" : "gemm_avx2.int8"),
         "AVX-VNNI, 8 bits");
  const bool amx = Available("gemm_amx.int4");
  EXPECT(Selected("amx", "int4", 0) == (amx ? "gemm_amx.int4" : "gemm_avx512.int4"), "AMX");
  if (!Available("gemm_avx512_bf16.int4")) return;
  EXPECT(Selected("avx512", "int4", 3) == "gemm_avx512_bf16.int4", "level 3");
  EXPECT(Selected("avx512", "fp8_e4m3", 4) == "gemm_avx512_bf16.fp8_e4m3", "no whole numbers");
  EXPECT(Selected("avx512", "codebook4", 4) == "gemm_avx512_bf16.codebook4", "any numbers");
}
#endif

}  // namespace

int main(int argc, char** argv) {
  ReadArguments(argc, argv);
  unsetenv("QMOE_PLUGIN_CPU_ISA");
  RegisterEmulatedKernels(-1000);
  const bool only_selection = argc > 1 && std::string(argv[1]) == "--selection";
  if (!only_selection) TestAllKernels();
  TestSelection();
  std::printf("%d checks, %d failures; int4 at accuracy_level 4: %s\n", checks, failures,
              Selected(nullptr, "int4", 4).c_str());
  return failures != 0;
}
