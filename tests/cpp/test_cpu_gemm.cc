// The CPU kernels against double loops over what the RowReader delivers: every format, instruction
// set, block size, scale and zero point type, with tails in rows, columns and K; both ops on top of
// them; and that results have the same bits whatever the tasks, the batch and the vector width.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ops/cpu/gemm.h"
#include "ops/cpu/routing.h"
#include "ops/error.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/pack.h"
#include "ops/qmoe/qmoe.h"
#include "ops/registry.h"

using namespace qmoe_plugin;

namespace {

int checks = 0, failures = 0;

#define EXPECT(ok, ...)                                                            \
  do {                                                                             \
    ++checks;                                                                      \
    if (!(ok) && ++failures <= 20)                                                 \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, Concat(__VA_ARGS__).c_str()); \
  } while (false)

// Formats that nobody registers but that the kernels must take: the table paths of each width.
struct two_bits : formats::FormatBase<two_bits, 2> {
  static constexpr char kName[] = "test_2bit";
  static constexpr float kDefaultZeroPoint = 2;
  static constexpr bool kZeroPoints = true;
  static float Decode(uint32_t code) { return float(code); }
};
struct four_bit_table : formats::FormatBase<four_bit_table, 4> {
  static constexpr char kName[] = "test_4bit";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static float Decode(uint32_t code) { return (code & 8 ? -1.0f : 1.0f) * float(1 << (code & 7)); }
};
struct eight_bit_table : formats::FormatBase<eight_bit_table, 8> {
  static constexpr char kName[] = "test_8bit";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static float Decode(uint32_t code) { return (float(code) - 100.5f) * float(code % 7); }
};
struct four_bit_codebook : formats::FormatBase<four_bit_codebook, 4> {
  static constexpr char kName[] = "test_book";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr bool kCodebook = true;
  static float Decode(uint32_t) { return 0; }
};
const bool formats_registered = RegisterFormat(DescribeFormat<two_bits>()) &&
                                RegisterFormat(DescribeFormat<four_bit_table>()) &&
                                RegisterFormat(DescribeFormat<four_bit_codebook>()) &&
                                RegisterFormat(DescribeFormat<eight_bit_table>());

std::mt19937 rng(1);

float Gauss() { return std::normal_distribution<float>()(rng); }

/// A float tensor and a TensorView of it in its own type.
struct Tensor {
  std::vector<uint8_t> bytes;
  TensorView view;

  Tensor() = default;
  Tensor(DType dtype, std::vector<int64_t> shape, const std::function<float()>& value) {
    view = {.data = nullptr, .dtype = dtype, .shape = shape, .present = true};
    bytes.resize(view.bytes());
    view.data = bytes.data();
    for (int64_t i = 0; i < view.elements(); ++i) {
      if (dtype == DType::kUint8)
        bytes[i] = uint8_t(value());
      else
        StoreFloat(bytes.data(), dtype, i, value());
    }
  }
  Tensor(const Tensor&) = delete;
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;
};

enum class ZeroPoints { kNone, kPacked, kFloat };

struct Shape {
  const Format* format;
  int64_t experts, n, k, block;
  DType scale_dtype = DType::kFloat16;
  ZeroPoints zero_points = ZeroPoints::kNone;
  bool bias = false;

  std::string Describe() const {
    return Concat(format->name, " E ", experts, " N ", n, " K ", k, " block ", block, " scales ",
                  qmoe_plugin::Name(scale_dtype), " zp ", int(zero_points), " bias ", bias);
  }
};

/// Random weights of a projection, and the tensors that hold them.
struct Weights {
  Tensor codes, scales, zero_points, bias, codebook;
  Projection projection;

  explicit Weights(const Shape& s) {
    projection = {.name = "W",
                  .format = s.format,
                  .experts = s.experts,
                  .n = s.n,
                  .k = s.k,
                  .block_size = s.block,
                  .codes = {},
                  .scales = {},
                  .zero_points = {},
                  .bias = {},
                  .group_index = {}};
    const int64_t groups = projection.groups(), bits = s.format->bits;
    const auto byte = [] { return float(rng() & 255); };
    const auto number = [&] {  // weights must not be NaN, which only 8-bit formats can be
      float code = byte();
      while (bits == 8 && std::isnan(s.format->centered[size_t(code)])) code = byte();
      return code;
    };
    codes = Tensor(DType::kUint8, {s.experts, s.n, (s.k * bits + 7) / 8}, number);
    std::vector<int64_t> per_block = {s.experts, s.n, groups};
    scales = Tensor(s.scale_dtype, per_block, [] { return 0.05f * Gauss() + 0.01f; });
    projection.codes = codes.view;
    projection.scales = scales.view;
    if (s.zero_points == ZeroPoints::kFloat)
      zero_points =
          Tensor(DType::kFloat32, per_block, [&] { return std::ldexp(0.4f, int(bits)) + Gauss(); });
    if (s.zero_points == ZeroPoints::kPacked)
      zero_points = s.block ? Tensor(DType::kUint8, {s.experts, s.n, (groups * bits + 7) / 8}, byte)
                            : Tensor(DType::kUint8, {s.experts, (s.n * bits + 7) / 8}, byte);
    projection.zero_points = zero_points.view;
    if (s.format->codebook) codebook = Tensor(DType::kFloat32, {int64_t(1) << bits}, Gauss);
    projection.codebook = codebook.view;
    if (s.bias) bias = Tensor(DType::kFloat32, {s.experts, s.n}, Gauss);
    projection.bias = bias.view;
  }
};

/// Dequantised rows of a reader, in double: [E, rows, k].
std::vector<double> Dequantize(const RowReader& reader) {
  const int64_t k = reader.k(), block = reader.block_size() ? reader.block_size() : k;
  std::vector<uint8_t> codes(k);
  std::vector<float> scales(reader.groups()), offsets(reader.groups());
  const auto value = [&](uint8_t code) {
    return double(reader.codebook().empty() ? reader.format().centered[code]
                                            : reader.codebook()[code]);
  };
  std::vector<double> w;
  for (int64_t e = 0; e < reader.experts(); ++e) {
    for (int64_t row = 0; row < reader.rows(); ++row) {
      reader.Codes(e, row, codes.data());
      reader.Scales(e, row, scales.data());
      reader.ZeroOffsets(e, row, offsets.data());
      for (int64_t i = 0; i < k; ++i)
        w.push_back((value(codes[i]) + offsets[i / block]) * scales[i / block]);
    }
  }
  return w;
}

struct Reference {
  double value, magnitude;  // the sum, and the sum of its terms' magnitudes
};

Reference Dot(const double* w, const float* x, int64_t k) {
  Reference r{};
  for (int64_t i = 0; i < k; ++i) {
    r.value += w[i] * x[i];
    r.magnitude += std::fabs(w[i] * x[i]);
  }
  return r;
}

const std::vector<const Kernel*>& CpuKernels(const Format* format) {
  static std::vector<const Kernel*> kernels;
  kernels.clear();
  for (const Kernel* kernel : Kernels())
    if (kernel->device == DeviceType::kCpu && kernel->format == format && kernel->available())
      kernels.push_back(kernel);
  return kernels;
}

GemmArgs ArgsOf(const PackedWeights& w, const CpuGemm& gemm, int64_t expert, float* table) {
  const int64_t tile = expert * w.shape.row_tiles;
  const int64_t scales =
      tile * std::max<int64_t>(w.shape.groups, 1) * 16 * int64_t(SizeOf(w.scale_dtype()));
  const auto at = [scales](const void* p) { return p ? (const uint8_t*)p + scales : nullptr; };
  GemmArgs args{};
  args.codes = w.codes() + tile * w.shape.tile_bytes;
  args.block_scales = at(w.block_scales());
  args.zero_offsets = at(w.zero_offsets());
  args.row_scales = w.row_scales() + tile * 16;
  args.bias = w.bias() ? w.bias() + tile * 16 : nullptr;
  args.half_scales = w.scale_dtype() == DType::kFloat16;
  args.panels = w.shape.row_tiles;
  args.k_padded = w.shape.k_padded;
  args.block_size = w.header.block_size;
  const int codes = 1 << GetFormat(w.header.FormatName()).bits;
  for (int i = 0; i < 256; ++i) table[i] = w.codebook() ? w.codebook()[i % codes] : gemm.table[i];
  args.table = table;
  return args;
}

/// Every kernel of the shape's format, for row counts up to 30.
void TestKernels(const Shape& shape) {
  const Weights weights(shape);
  const RowReader reader(weights.projection);
  const std::vector<double> w = Dequantize(reader);
  const PackedWeights packed =
      PackToHost(reader, false, Layout::kCpuPanel16, ScalePolicy::kFloat16IfExact);
  const int64_t rows = 30, kp = packed.shape.k_padded, columns = packed.shape.row_tiles * 16;
  std::vector<float> x(rows * kp);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < shape.k; ++k) x[r * kp + k] = Gauss();
  std::vector<int32_t> index(rows, 0);
  for (int32_t& i : index) i = int32_t(rng() % unsigned(rows));

  const int64_t expert = shape.experts - 1;
  std::vector<float> simd;  // all rows at once by the first SIMD kernel
  for (const Kernel* kernel : CpuKernels(shape.format)) {
    const CpuGemm& gemm = *static_cast<const CpuGemm*>(kernel->launch);
    const std::string what = kernel->name + ": " + shape.Describe();
    float table[256];
    GemmArgs args = ArgsOf(packed, gemm, expert, table);
    std::vector<float> all(rows * columns), part(rows * columns);
    args.x = x.data();
    args.ldx = kp;
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
    // The same rows in smaller batches, and picked by an index.
    for (int64_t m = 1; m <= 14; ++m) {
      args.rows = m;
      args.y = part.data();
      args.row_index = nullptr;
      gemm.gemm(args);
      EXPECT(std::memcmp(part.data(), all.data(), (m * columns) * 4) == 0, what, ": ", m,
             " rows give other bits than ", rows);
      args.row_index = index.data();
      gemm.gemm(args);
      for (int64_t r = 0; r < m; ++r)
        EXPECT(std::memcmp(&part[r * columns], &all[index[r] * columns], columns * 4) == 0, what,
               ": wrong row by index");
    }
    if (gemm.isa == &kCpuReference) continue;
    if (simd.empty()) simd = all;
    EXPECT(std::memcmp(simd.data(), all.data(), all.size() * 4) == 0, what,
           ": other bits than the other vector width");
  }
}

void TestAllKernels() {
  for (const Format* format : Formats()) {
    EXPECT(!CpuKernels(format).empty(), "no CPU kernel for ", format->name);
    for (int64_t block : {0, 16, 32, 64, 128, 256}) {
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

/// ParallelFor implementations that must not change any bit.
ParallelFor Serial() {
  return [](size_t total, const std::function<void(size_t)>& fn) {
    for (size_t i = 0; i < total; ++i) fn(i);
  };
}
ParallelFor Backwards() {
  return [](size_t total, const std::function<void(size_t)>& fn) {
    for (size_t i = total; i-- > 0;) fn(i);
  };
}
ParallelFor Threads(size_t count) {
  return [count](size_t total, const std::function<void(size_t)>& fn) {
    std::vector<std::thread> threads;
    for (size_t t = 0; t < count; ++t)
      threads.emplace_back([&, t] {
        for (size_t i = t; i < total; i += count) fn(i);
      });
    for (std::thread& thread : threads) thread.join();
  };
}

/// Calls run(context) with a workspace full of NaN that ends where it must.
template <class Run>
void WithContext(size_t workspace, const ParallelFor& parallel_for, const Run& run) {
  const size_t rounded = (workspace + 255) / 256 * 256;
  uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(256, rounded + 256));
  std::memset(memory, 0xff, rounded + 256);
  ExecutionContext context;
  context.parallel_for = parallel_for;
  context.workspace = memory;
  run(context);
  EXPECT(
      std::all_of(memory + workspace, memory + rounded + 256, [](uint8_t b) { return b == 0xff; }),
      "a run wrote behind its workspace of ", workspace, " bytes");
  std::free(memory);
}

/// What an output may be off by, relative to its terms: its own rounding, and float32 sums.
double Tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kFloat16 ? 6e-4 : 5e-3;
}

void TestMatMul(const Shape& shape, DType dtype, int64_t m, bool group_index) {
  Weights weights(shape);
  std::vector<int32_t> groups(shape.k);
  if (group_index) {
    for (int64_t k = 0; k < shape.k; ++k) groups[k] = int32_t(k / shape.block);
    std::shuffle(groups.begin(), groups.end(), rng);
    weights.projection.group_index = {
        .data = groups.data(), .dtype = DType::kInt32, .shape = {shape.k}, .present = true};
  }
  const Tensor a(dtype, {m, shape.k}, Gauss);
  const RowReader reader(weights.projection);
  const std::vector<double> w = Dequantize(reader);
  const MatMulConfig config{.dtype = dtype, .n = shape.n, .k = shape.k};
  const auto op = MakeMatMulNBits(Device{}, config, weights.projection);
  std::vector<std::vector<uint8_t>> results;
  for (const ParallelFor& parallel_for : {Serial(), Backwards(), Threads(3)}) {
    std::vector<uint8_t>& y = results.emplace_back((m * shape.n) * SizeOf(dtype) + 16, 0xaa);
    WithContext(op->WorkspaceBytes(m), parallel_for, [&](const ExecutionContext& context) {
      op->Run({.m = m, .a = a.bytes.data(), .y = y.data()}, context);
    });
  }
  const std::string what = Concat("MatMulNBits ", shape.Describe(), " M ", m, " ",
                                  qmoe_plugin::Name(dtype), " g_idx ", group_index);
  EXPECT(results[0] == results[1] && results[0] == results[2], what, ": tasks change the bits");
  for (size_t i = results[0].size() - 16; i < results[0].size(); ++i)
    EXPECT(results[0][i] == 0xaa, what, ": wrote behind Y");
  std::vector<float> x(reader.k());
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t p = 0; p < reader.k(); ++p) {
      const int64_t k = reader.k_order().empty() ? p : reader.k_order()[p];
      x[p] = k < 0 ? 0 : LoadFloat(a.bytes.data(), dtype, r * shape.k + k);
    }
    for (int64_t n = 0; n < shape.n; ++n) {
      const Reference ref = Dot(&w[n * reader.k()], x.data(), reader.k());
      const double bias = reader.Bias(0, n);
      const double y = LoadFloat(results[0].data(), dtype, r * shape.n + n);
      EXPECT(std::fabs(y - ref.value - bias) <=
                 Tolerance(dtype) * (ref.magnitude + std::fabs(bias)) + 1e-7,
             what, ": y[", r, ", ", n, "] = ", y, ", not ", ref.value + bias);
    }
  }
}

void TestMatMuls() {
  for (const char* name : {"int2", "int4", "int8"}) {
    const Format* format = &GetFormat(name);
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (int64_t m : {0, 1, 5, 61})
        TestMatMul({format, 1, 130, 93, 32, DType::kFloat16, ZeroPoints::kPacked, true}, dtype, m,
                   false);
      TestMatMul({format, 1, 33, 256, 16, DType::kFloat32, ZeroPoints::kFloat, true}, dtype, 7,
                 false);
      TestMatMul({format, 1, 1, 16, 16}, dtype, 1, false);
    }
    TestMatMul({format, 1, 40, 128, 32, DType::kFloat32, ZeroPoints::kPacked}, DType::kFloat32, 9,
               true);
    TestMatMul({format, 1, 40, 100, 32, DType::kFloat32, ZeroPoints::kNone, true}, DType::kFloat16,
               3, true);
    TestMatMul({format, 1, 40, 256, 64}, DType::kFloat32, 1000, false);
    TestMatMul({format, 1, 40, 264, 64}, DType::kFloat32, 1000, false);
  }
}

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double Activated(const ActivationParams& p, double gate, double up) {
  switch (p.type) {
    case Activation::kIdentity:
      return gate;
    case Activation::kRelu:
      return std::max(gate, 0.0);
    case Activation::kGelu:
      return 0.5 * gate * std::erfc(-gate / std::sqrt(2.0));
    case Activation::kSilu:
      return gate * Sigmoid(gate);
    case Activation::kSwiglu: {
      const double g = std::min<double>(gate, p.limit);
      return g * Sigmoid(p.alpha * g) * (std::clamp<double>(up, -p.limit, p.limit) + p.beta);
    }
    case Activation::kGeglu:  // 0.5 (1 + tanh z) = sigmoid(2 z), which does not cancel
      return gate * up * Sigmoid(2 * std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate));
  }
  return 0;
}

struct MoeCase {
  Activation activation = Activation::kSwiglu;
  int64_t tokens = 3, hidden = 64, inter = 48, experts = 5, topk = 2, block = 16;
  DType dtype = DType::kFloat32;
  DType router_dtype = DType::kFloat32;
  bool normalize = true, router_weights = false, sparse_mixer = false, alias = false;
  RowOrder order = RowOrder::kAsStored;
  ZeroPoints zero_points = ZeroPoints::kNone;
  const char* format = "int4";
};

/// The two routing lines of ops/qmoe/qmoe.h in double, by a full sort.
void RouteInDouble(const MoeConfig& c, const float* logits, const float* weights,
                   std::vector<int32_t>& ids, std::vector<double>& factors) {
  std::vector<int32_t> order(c.experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  ids.assign(order.begin(), order.begin() + c.topk);
  factors.clear();
  double all = 0, sum = 0;
  for (int64_t e = 0; e < c.experts; ++e) all += std::exp(double(logits[e]) - logits[order[0]]);
  for (int32_t id : ids)
    factors.push_back(weights ? weights[id]
                              : std::exp(double(logits[id]) - logits[order[0]]) / all);
  for (double f : factors) sum += f;
  if (c.normalize_routing_weights && sum > 1e-6)
    for (double& f : factors) f /= sum;
}

void TestMoe(const MoeCase& c) {
  const bool gated = IsGated(c.activation);
  const Format* format = &GetFormat(c.format);
  const bool two = c.order == RowOrder::kTwoMatrices;
  const int64_t fc1_rows = c.inter * (gated && !two ? 2 : 1);
  Weights fc1(
      {format, c.experts, fc1_rows, c.hidden, c.block, DType::kFloat16, c.zero_points, true});
  Weights fc3(
      {format, c.experts, c.inter, c.hidden, c.block, DType::kFloat16, c.zero_points, true});
  Weights fc2(
      {format, c.experts, c.hidden, c.inter, c.block, DType::kFloat16, c.zero_points, true});
  MoeConfig config;
  config.dtype = c.dtype;
  config.hidden_size = c.hidden;
  config.inter_size = c.inter;
  config.experts = c.experts;
  config.topk = c.topk;
  config.normalize_routing_weights = c.normalize;
  config.use_sparse_mixer = c.sparse_mixer;
  config.activation = {.type = c.activation, .alpha = 1.702f, .beta = 1.0f, .limit = 7.0f};
  const MoeWeights weights{fc1.projection, c.order, fc2.projection, fc3.projection};
  const auto op = MakeQMoe(Device{}, config, weights);
  const RowReader reader1 = MakeFc1Reader(config, weights),
                  reader2 = MakeFc2Reader(config, weights);
  const std::vector<double> w1 = Dequantize(reader1), w2 = Dequantize(reader2);

  const Tensor input(c.dtype, {c.tokens, c.hidden}, Gauss);
  const Tensor logits(c.router_dtype, {c.tokens, c.experts}, Gauss);
  const Tensor router(c.router_dtype, {c.tokens, c.experts}, [] { return std::fabs(Gauss()); });
  std::vector<std::vector<uint8_t>> results;
  for (const ParallelFor& parallel_for : {Serial(), Backwards(), Threads(3)}) {
    std::vector<uint8_t>& y = results.emplace_back(input.bytes);
    y.resize(y.size() + 16, 0xaa);
    WithContext(op->WorkspaceBytes(c.tokens), parallel_for, [&](const ExecutionContext& context) {
      MoeTensors t{.tokens = c.tokens,
                   .input = c.alias ? y.data() : input.bytes.data(),
                   .router_probs = logits.bytes.data(),
                   .router_probs_dtype = c.router_dtype,
                   .router_weights = c.router_weights ? router.bytes.data() : nullptr,
                   .router_weights_dtype = c.router_dtype,
                   .output = y.data()};
      op->Run(t, context);
    });
    EXPECT(std::all_of(y.end() - 16, y.end(), [](uint8_t b) { return b == 0xaa; }),
           "wrote behind y");
  }
  const std::string what =
      Concat("QMoE ", c.format, " act ", int(c.activation), " T ", c.tokens, " H ", c.hidden, " I ",
             c.inter, " E ", c.experts, " k ", c.topk, " block ", c.block, " ",
             qmoe_plugin::Name(c.dtype), " order ", int(c.order), " alias ", c.alias);
  EXPECT(results[0] == results[1] && results[0] == results[2], what, ": tasks change the bits");

  std::vector<float> x(c.hidden), row(c.experts), given(c.experts);
  std::vector<int32_t> ids;
  std::vector<double> factors, h(c.inter);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.hidden; ++i)
      x[i] = LoadFloat(input.bytes.data(), c.dtype, t * c.hidden + i);
    for (int64_t e = 0; e < c.experts; ++e) {
      row[e] = LoadFloat(logits.bytes.data(), c.router_dtype, t * c.experts + e);
      given[e] = LoadFloat(router.bytes.data(), c.router_dtype, t * c.experts + e);
    }
    if (c.sparse_mixer) {
      std::vector<float> f(c.topk, 0.0f);
      ids.resize(c.topk);
      cpu::RouteToken(config, row.data(), nullptr, ids.data(), f.data());  // has a test of its own
      factors.assign(f.begin(), f.end());
    } else {
      RouteInDouble(config, row.data(), c.router_weights ? given.data() : nullptr, ids, factors);
    }
    std::vector<double> y(c.hidden), magnitude(c.hidden);
    for (size_t j = 0; j < ids.size(); ++j) {
      const int64_t e = ids[j], f = gated ? 2 : 1;
      for (int64_t i = 0; i < c.inter; ++i) {
        const auto sum = [&](int64_t r) {
          return Dot(&w1[(e * c.inter * f + r) * c.hidden], x.data(), c.hidden).value +
                 reader1.Bias(e, r);
        };
        h[i] = Activated(config.activation, sum(f * i), gated ? sum(f * i + 1) : 0);
      }
      for (int64_t n = 0; n < c.hidden; ++n) {
        double sum = reader2.Bias(e, n), terms = std::fabs(sum);
        for (int64_t i = 0; i < c.inter; ++i) {
          const double term = w2[(e * c.hidden + n) * c.inter + i] * h[i];
          sum += term;
          terms += std::fabs(term);
        }
        y[n] += factors[j] * sum;
        magnitude[n] += std::fabs(factors[j]) * terms;
      }
    }
    for (int64_t n = 0; n < c.hidden; ++n) {
      const double got = LoadFloat(results[0].data(), c.dtype, t * c.hidden + n);
      EXPECT(std::fabs(got - y[n]) <= 2 * Tolerance(c.dtype) * magnitude[n] + 1e-7, what, ": y[", t,
             ", ", n, "] = ", got, ", not ", y[n]);
    }
  }
}

/// Formats without zero points, in the block sizes that models give them.
void TestFloatFormats() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int64_t m : {1, 61}) {
      TestMatMul({&GetFormat("mxfp4"), 1, 130, 96, 32}, dtype, m, false);
      TestMatMul({&GetFormat("nvfp4"), 1, 130, 96, 16}, dtype, m, false);
      TestMatMul({&GetFormat("test_book"), 1, 130, 96, 64}, dtype, m, false);
      for (int64_t block : {0, 128})
        TestMatMul({&GetFormat("fp8_e4m3"), 1, 130, 200, block}, dtype, m, false);
    }
    TestMoe({.hidden = 96, .inter = 160, .block = 32, .dtype = dtype, .format = "mxfp4"});
    TestMoe({.tokens = 70, .block = 16, .dtype = dtype, .format = "nvfp4"});
    TestMoe({.hidden = 72, .inter = 40, .block = 0, .dtype = dtype, .format = "test_book"});
    TestMoe({.hidden = 72, .inter = 40, .block = 0, .dtype = dtype, .format = "fp8_e4m3"});
  }
}

void TestMoes() {
  const DType f16 = DType::kFloat16, bf16 = DType::kBFloat16;
  for (Activation a : {Activation::kIdentity, Activation::kRelu, Activation::kGelu,
                       Activation::kSilu, Activation::kSwiglu, Activation::kGeglu}) {
    for (DType dtype : {DType::kFloat32, f16, bf16}) TestMoe({.activation = a, .dtype = dtype});
    TestMoe({.activation = a, .tokens = 70, .topk = 3, .zero_points = ZeroPoints::kPacked});
    TestMoe(
        {.activation = a, .hidden = 40, .inter = 24, .block = 0, .alias = true, .format = "int8"});
  }
  for (const ZeroPoints kind : {ZeroPoints::kNone, ZeroPoints::kPacked, ZeroPoints::kFloat})
    TestMoe({.tokens = 20, .zero_points = kind, .format = "int2"});
  TestMoe({.tokens = 0});
  TestMoe({.tokens = 1, .alias = true});
  TestMoe({.hidden = 288, .inter = 352, .block = 32, .dtype = f16, .router_dtype = bf16});
  TestMoe({.hidden = 256, .inter = 512, .block = 256, .zero_points = ZeroPoints::kFloat});
  TestMoe({.order = RowOrder::kHalves});
  TestMoe({.order = RowOrder::kTwoMatrices});
  TestMoe({.activation = Activation::kGeglu, .order = RowOrder::kTwoMatrices});
  TestMoe({.normalize = false});
  TestMoe({.normalize = false, .router_weights = true});
  TestMoe({.router_weights = true});
  TestMoe({.topk = 5});
  TestMoe({.tokens = 100, .experts = 1, .topk = 1});
  TestMoe({.tokens = 9, .experts = 60, .topk = 6});
  TestMoe({.sparse_mixer = true});
  // Several chunks of tokens, in place.
  TestMoe({.tokens = 300, .hidden = 32, .inter = 16, .experts = 40, .topk = 32, .alias = true});
}

/// The same token alone and in a batch gives the same bits.
void TestBatchInvariance() {
  Weights fc1({&GetFormat("int4"), 8, 96, 64, 32, DType::kFloat16, ZeroPoints::kNone, true});
  Weights fc2({&GetFormat("int4"), 8, 64, 96, 32, DType::kFloat16, ZeroPoints::kNone, true});
  MoeConfig config;
  config.hidden_size = 64;
  config.inter_size = 96;
  config.experts = 8;
  config.topk = 3;
  config.activation.type = Activation::kSilu;
  const auto op =
      MakeQMoe(Device{}, config, {fc1.projection, RowOrder::kAsStored, fc2.projection, {}});
  const int64_t tokens = 65;
  const Tensor x(DType::kFloat32, {tokens, 64}, Gauss), logits(DType::kFloat32, {tokens, 8}, Gauss);
  const auto run = [&](int64_t first, int64_t count) {
    std::vector<float> y(count * 64);
    WithContext(op->WorkspaceBytes(count), Serial(), [&](const ExecutionContext& context) {
      MoeTensors t;
      t.tokens = count;
      t.input = x.bytes.data() + first * 64 * 4;
      t.router_probs = logits.bytes.data() + first * 8 * 4;
      t.output = y.data();
      op->Run(t, context);
    });
    return y;
  };
  const std::vector<float> all = run(0, tokens);
  for (int64_t t = 0; t < tokens; ++t)
    EXPECT(std::memcmp(run(t, 1).data(), &all[t * 64], 64 * 4) == 0, "token ", t,
           " alone has other bits than in the batch");
}

void TestRouting() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  MoeConfig c;
  c.experts = 6;
  c.topk = 3;
  int32_t ids[6];
  float f[6];
  const auto route = [&](std::vector<float> logits) {
    cpu::RouteToken(c, logits.data(), nullptr, ids, f);
  };
  route({1, 3, 3, 0, 3, 2});
  EXPECT(ids[0] == 1 && ids[1] == 2 && ids[2] == 4, "ties: ", ids[0], " ", ids[1], " ", ids[2]);
  route({-inf, 5, -inf, -inf, 4, -inf});
  EXPECT(ids[0] == 1 && ids[1] == 4 && ids[2] == 0 && f[2] == 0, "-inf: ", ids[2], " ", f[2]);
  EXPECT(std::fabs(f[0] - 1 / (1 + std::exp(-1.0))) < 1e-6, "-inf: ", f[0]);
  route({nan, -inf, nan, 1, nan, nan});
  EXPECT(ids[0] == 3 && ids[1] == 1 && ids[2] == 0 && std::isnan(f[0]), "NaN: ", ids[0], ids[1],
         ids[2]);
  c.topk = 6;
  route({nan, nan, nan, nan, nan, nan});
  for (int i = 0; i < 6; ++i) EXPECT(ids[i] == i, "all NaN: ", ids[i]);
  route({-200, -300, -200, -200, -200, -200});
  c.normalize_routing_weights = true;
  const float weights[6] = {0, 0, 1e-8f, 0, 0, 0};
  const float logits[6] = {1, 2, 3, 4, 5, 6};
  cpu::RouteToken(c, logits, weights, ids, f);
  EXPECT(f[3] == 1e-8f, "a sum under 1e-6 is not divided by: ", f[3]);

  // Sparse mixer, by hand: of the best, 1.0, only 0.985 is within 2 %; of the second, 0.985, 0.97 is.
  c = {};
  c.experts = 4;
  c.topk = 2;
  c.use_sparse_mixer = true;
  route({0.5f, 1.0f, 0.985f, 0.97f});
  EXPECT(ids[0] == 1 && ids[1] == 2, "sparse mixer: ", ids[0], " ", ids[1]);
  EXPECT(std::fabs(f[0] - 1 / (1 + std::exp(-0.015))) < 1e-6, "sparse mixer: ", f[0]);
  EXPECT(std::fabs(f[1] - 1 / (1 + std::exp(-0.015))) < 1e-6, "sparse mixer: ", f[1]);
  c.experts = 2;
  route({-3, -4});
  EXPECT(ids[0] == 0 && f[0] == 1 && ids[1] == 1 && f[1] == 1, "sparse mixer E 2: ", f[0], " ",
         f[1]);
}

std::vector<const CpuIsa*> Isas() {
  std::vector<const CpuIsa*> isas;
  for (const Kernel* kernel : CpuKernels(&GetFormat("int4")))
    isas.push_back(static_cast<const CpuGemm*>(kernel->launch)->isa);
  return isas;
}

/// Relative errors over a grid; of tails below 1e-4, what they are off by counts.
void TestActivations() {
  for (const CpuIsa* isa : Isas()) {
    for (Activation a : {Activation::kIdentity, Activation::kRelu, Activation::kGelu,
                         Activation::kSilu, Activation::kSwiglu, Activation::kGeglu}) {
      const ActivationParams params{.type = a, .alpha = 1.702f, .beta = 1.0f, .limit = 7.0f};
      const int64_t n = 200003;  // not a multiple of any vector
      const int64_t per_value = IsGated(a) ? 2 : 1;
      std::vector<float> x(n * per_value), y(n);
      for (int64_t i = 0; i < n; ++i) {
        x[i * per_value] = float(i - n / 2) * 1.2e-4f;  // -12 to 12
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

void TestIsaVariable() {
  const GemmProblem problem{.format = &GetFormat("int4"), .n = 16, .k = 32, .block_size = 32};
  for (const char* level : {"reference", "avx2", "avx512"}) {
    setenv("QMOE_PLUGIN_CPU_ISA", level, 1);
    const std::string name = Select(Device{}, problem).name;
    EXPECT(std::string(level) != "reference" || name == "gemm_reference.int4", level, " gives ",
           name);
    EXPECT(std::string(level) != "avx2" || name != "gemm_avx512.int4", level, " gives ", name);
    TestMoe({.tokens = 20, .hidden = 96, .inter = 80});
  }
  setenv("QMOE_PLUGIN_CPU_ISA", "sse9", 1);
  try {
    Select(Device{}, problem);
    EXPECT(false, "an unknown QMOE_PLUGIN_CPU_ISA was accepted");
  } catch (const Error& error) {
    EXPECT(std::string(error.what()).find("sse9") != std::string::npos, error.what());
  }
  unsetenv("QMOE_PLUGIN_CPU_ISA");
}

}  // namespace

int main() {
  unsetenv("QMOE_PLUGIN_CPU_ISA");
  TestAllKernels();
  TestActivations();
  TestConversions();
  TestRouting();
  TestMatMuls();
  TestMoes();
  TestFloatFormats();
  TestBatchInvariance();
  TestIsaVariable();
  std::printf("%d checks, %d failures; levels:", checks, failures);
  for (const CpuIsa* isa : Isas()) std::printf(" %s", isa->name);
  std::printf("\n");
  return failures != 0;
}
