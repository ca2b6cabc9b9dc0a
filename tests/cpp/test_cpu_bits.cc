// The SIMD kernels against the sums that ops/cpu/gemm.h and gemm_blocks.inc describe, in plain C++:
// the same bits, of exact kernels and of those that round to int8. As this is so on every instruction
// set, results are the same on x86-64 and AArch64, too. And int8 through an op, level by level.
#include <cstdlib>
#include <cstring>
#include <map>

#include "ops/cpu/layout.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "tests/cpp/gemm_testing.h"

using namespace qmoe_plugin;

namespace {

/// Sums of the elements of a panel.
class Panel {
 public:
  Panel(const GemmArgs& args, const Format& format, int64_t panel)
      : args_(args), format_(format), panel_(panel) {}

  /// y[n] as exact kernels compute it.
  float Exact(int n, const float* x) const {
    float total = 0;
    for (int64_t first = 0; first < args_.k_padded;) {
      const int64_t g = first / Block(), last = std::min(first + 128, (g + 1) * Block());
      float sum = 0;
      for (int64_t k = first; k < last; ++k)
        sum = std::fma(Number(n, k) + ZeroOffset(n, g), x[k], sum);
      total = std::fma(sum, Scale(n, g), total);
      first = last;
    }
    return WithRowScale(n, total);
  }

  /// y[n] with activations rounded to int8 in blocks of so many.
  float Int8(int n, const float* x, int64_t block) const {
    float total = 0;
    for (int64_t first = 0; first < args_.k_padded; first += block) {
      float largest = 0;
      for (int64_t k = first; k < first + block; ++k) largest = std::max(largest, std::fabs(x[k]));
      const float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
      float products = 0, sum = 0;  // multiples of 1/2 below 2^23: no rounding
      for (int64_t k = first; k < first + block; ++k) {
        const float rounded = float(std::nearbyint(double(x[k]) * double(inverse)));
        products += Number(n, k) * rounded;
        sum += rounded;
      }
      const int64_t g = first / Block();
      products = std::fma(ZeroOffset(n, g), sum, products);
      total = std::fma(products * scale, Scale(n, g), total);
    }
    return WithRowScale(n, total);
  }

 private:
  int64_t Block() const { return args_.block_size ? args_.block_size : args_.k_padded; }

  float Number(int n, int64_t k) const {
    const int bits = format_.bits, codes = 32 / bits;
    const uint8_t* panel = args_.codes + panel_ * (args_.k_padded * 2 * bits);
    uint32_t dword;
    std::memcpy(&dword, panel + k / codes * 64 + 4 * n, sizeof dword);
    const uint32_t code = dword >> cpu::CodeShift(bits, int(k % codes));
    if (!format_.plain()) return args_.table[code & 255 & ((1u << bits) - 1)];
    return LoadFloat(&code, format_.plain_type, 0);
  }

  float Value(const void* section, int n, int64_t g) const {
    const int64_t groups = args_.k_padded / Block();
    return LoadFloat(section, args_.half_scales ? DType::kFloat16 : DType::kFloat32,
                     size_t((panel_ * groups + g) * 16 + n));
  }
  float Scale(int n, int64_t g) const {
    return args_.block_scales ? Value(args_.block_scales, n, g) : 1.0f;
  }
  float ZeroOffset(int n, int64_t g) const {
    return args_.zero_offsets ? Value(args_.zero_offsets, n, g) : 0.0f;
  }
  float WithRowScale(int n, float total) const {
    return std::fma(total, args_.row_scales[panel_ * 16 + n],
                    args_.bias ? args_.bias[panel_ * 16 + n] : 0.0f);
  }

  const GemmArgs& args_;
  const Format& format_;
  const int64_t panel_;
};

void TestKernels(const Shape& shape) {
  constexpr int64_t kRows = 3;
  const Weights weights(shape);
  const RowReader reader(weights.projection);
  const PackedWeights packed =
      PackToHost(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat16IfExact);
  const int64_t kp = packed.shape.k_padded, columns = packed.shape.row_tiles * 16;
  std::vector<float> x(kRows * kp);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t k = 0; k < shape.k; ++k) x[r * kp + k] = Gauss();

  for (const Kernel* kernel : CpuKernels(shape.format)) {
    const CpuGemm& cpu = *static_cast<const CpuGemm*>(kernel->launch);
    const bool int8 = IsInt8(*kernel);
    if (cpu.isa == &kCpuReference || (RoundsActivations(*kernel) && !int8)) continue;
    const GemmKernel& gemm = cpu.For(shape.block);
    float table[256];
    GemmArgs args = ArgsOf(packed, cpu, 0, table);
    args.row_bytes = kp / 32 * gemm.bytes_of_32;
    std::vector<uint8_t> stored(kRows * args.row_bytes);
    for (int64_t r = 0; int8 && r < kRows; ++r)
      gemm.store(&x[r * kp], 0, kp, {&stored[r * args.row_bytes]});
    std::vector<float> y(kRows * columns);
    args.x = int8 ? static_cast<const void*>(stored.data()) : x.data();
    args.rows = kRows;
    args.ldy = columns;
    args.y = y.data();
    gemm.gemm(args);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t n = 0; n < shape.n; ++n) {
        const Panel panel(args, *shape.format, n / 16);
        const float expected = int8
                                   ? panel.Int8(int(n % 16), &x[r * kp], shape.block % 32 ? 16 : 32)
                                   : panel.Exact(int(n % 16), &x[r * kp]);
        EXPECT(std::memcmp(&expected, &y[r * columns + n], sizeof expected) == 0, kernel->name,
               ": ", shape.Describe(), ": y[", r, ", ", n, "] = ", y[r * columns + n],
               " has other bits than ", expected);
      }
    }
  }
}

void TestAllKernels() {
  for (const Format* format : Formats()) {
    for (int64_t block : {0, 16, 32, 256}) {
      if (format->plain() && block) continue;
      TestKernels({format, 1, 37, 512, block});
      if (format->zero_points)
        TestKernels({format, 1, 20, 260, block, DType::kFloat32, ZeroPoints::kFloat, true});
    }
  }
}

/// MatMulNBits at accuracy_level 4: all int8 kernels that there are give the same bits.
void TestOp(const Shape& shape, int64_t m) {
  const Weights weights(shape);
  const Tensor a(DType::kFloat32, {m, shape.k}, Gauss);
  std::map<std::string, std::vector<float>> results;  // by kernel
  for (const std::string& level : kLevels) {
    setenv("QMOE_PLUGIN_CPU_ISA", level.c_str(), 1);
    const GemmProblem problem{
        .format = shape.format, .n = shape.n, .block_size = shape.block, .accuracy_level = 4};
    const Kernel& kernel = Select(Device{}, problem);
    const MatMulConfig config{
        .dtype = DType::kFloat32, .n = shape.n, .k = shape.k, .accuracy_level = 4};
    const auto op = MakeMatMulNBits(Device{}, config, weights.projection);
    unsetenv("QMOE_PLUGIN_CPU_ISA");
    if (!IsInt8(kernel)) continue;
    std::vector<float>& y = results[kernel.name];
    y.resize(m * shape.n);
    const size_t bytes = (op->WorkspaceBytes(m) + 255) / 256 * 256;
    ExecutionContext context;
    context.parallel_for = [](size_t total, const std::function<void(size_t)>& fn) {
      for (size_t i = 0; i < total; ++i) fn(i);
    };
    context.workspace = std::aligned_alloc(256, bytes);
    op->Run({.m = m, .a = a.bytes.data(), .y = y.data()}, context);
    std::free(context.workspace);
    EXPECT(y == results.begin()->second, shape.Describe(), ": ", kernel.name,
           " has other bits than ", results.begin()->first);
  }
}

}  // namespace

int main() {
  unsetenv("QMOE_PLUGIN_CPU_ISA");
  TestAllKernels();
  for (const char* format : {"int2", "int4", "int8", "mxfp4", "nvfp4"})
    for (int64_t m : {1, 7})
      TestOp({&GetFormat(format), 1, 130, 288, std::string(format) == "nvfp4" ? 16 : 32}, m);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
