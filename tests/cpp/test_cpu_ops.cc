// The two ops on the CPU against double loops: types, activations, routing, tails, g_idx, in place
// and in chunks; and that results have the same bits whatever the tasks and the batch.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "ops/cpu/routing.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/qmoe/qmoe.h"
#include "tests/cpp/cpu_testing.h"
#include "tests/cpp/emulated/kernels.h"

using namespace qmoe_plugin;

namespace {

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
struct MoeCase {
  Activation activation = Activation::kSwiglu;
  int64_t tokens = 3, hidden = 64, inter = 48, experts = 5, topk = 2, block = 16;
  DType dtype = DType::kFloat32;
  DType router_dtype = DType::kFloat32;
  bool normalize = true, router_weights = false, sparse_mixer = false, alias = false;
  bool limit_after = false;
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
  config.activation = SomeParams(c.activation, c.limit_after);
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
      for (int64_t block : {0, 128})
        TestMatMul({&GetFormat("fp8_e4m3"), 1, 130, 200, block}, dtype, m, false);
    }
    TestMoe({.hidden = 96, .inter = 160, .block = 32, .dtype = dtype, .format = "mxfp4"});
    TestMoe({.tokens = 70, .block = 16, .dtype = dtype, .format = "nvfp4"});
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
  TestMoe({.limit_after = true});
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
void TestBatchInvariance(AccuracyLevel level) {
  Weights fc1({&GetFormat("int4"), 8, 96, 64, 32, DType::kFloat16, ZeroPoints::kNone, true});
  Weights fc2({&GetFormat("int4"), 8, 64, 96, 32, DType::kFloat16, ZeroPoints::kNone, true});
  MoeConfig config;
  config.hidden_size = 64;
  config.inter_size = 96;
  config.experts = 8;
  config.topk = 3;
  config.activation.type = Activation::kSilu;
  config.accuracy_level = level;
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
  const auto expect_same = [&](int64_t first, int64_t count, const std::vector<float>& all,
                               int64_t all_first, const char* what) {
    const std::vector<float> part = run(first, count);
    EXPECT(std::equal(part.begin(), part.end(), all.begin() + (first - all_first) * 64), count,
           " tokens from ", first, " on have other bits than in a batch of ", what, " at level ",
           level);
  };
  // Few rows may have another kernel than many; here 3 rows a token go to 8 experts.
  const auto kernel = [&](int64_t rows) {
    const GemmProblem problem{.format = &GetFormat("int4"),
                              .experts = 8,
                              .rows = rows,
                              .n = 96,
                              .k = 64,
                              .block_size = 32,
                              .accuracy_level = level};
    return &Select(Device{}, problem);
  };
  const bool one_kernel = kernel(1) == kernel(3 * tokens);
  const std::vector<float> all = run(0, tokens);
  for (int64_t first : {0, 7, 20}) expect_same(first, 45, all, 0, "many");
  for (int64_t first = 0; first < tokens; first += 13) {
    const std::vector<float> few = run(first, 13);
    for (int64_t t = first; t < first + 13; ++t) {
      expect_same(t, 1, few, first, "few");
      if (one_kernel) expect_same(t, 1, all, 0, "any size");
    }
  }
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
void TestIsaVariable() {
  const GemmProblem problem{.format = &GetFormat("int4"), .n = 16, .k = 32, .block_size = 32};
  for (size_t i = 0; i < kLevels.size(); ++i) {
    setenv("QMOE_PLUGIN_CPU_ISA", kLevels[i].c_str(), 1);
    const std::string name = Select(Device{}, problem).name;
    EXPECT(i > 0 || name == "gemm_reference.int4", kLevels[i], " gives ", name);
    for (size_t above = i + 1; above < kLevels.size(); ++above)
      EXPECT(name != "gemm_" + kLevels[above] + ".int4", kLevels[i], " gives ", name);
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

void TestOps() {
  TestMatMuls();
  TestMoes();
  TestFloatFormats();
  for (AccuracyLevel level : {0, 3, 4}) TestBatchInvariance(level);
}

/// Both ops on kernels that this processor may not have.
void TestEmulatedKernels() {
  RegisterEmulatedKernels(1000);
  const auto selected = [](const char* format, AccuracyLevel level, int64_t n) {
    return Select(Device{}, {.format = &GetFormat(format), .n = n, .accuracy_level = level}).name;
  };
  if (selected("int4", 0, 64) != "emulated_amx.int4") return;  // no AVX-512
  for (AccuracyLevel level : {1, 2}) {
    EXPECT(selected("fp8_e4m3", level, 64) == "emulated_amx.fp8_e4m3", "level ", level);
    EXPECT(selected("codebook4", level, 64) == "gemm_avx512.codebook4", "rounded codebook");
    EXPECT(selected("float16", level, 64) == "gemm_avx512.float16", "rounded weights");
    EXPECT(selected("int4", level, 48) == "gemm_avx512.int4", "few columns");
  }
  for (AccuracyLevel level : {3, 4}) {
    EXPECT(selected("int4", level, 64) == "emulated_amx_bf16.int4", "level ", level);
    EXPECT(selected("codebook4", level, 64) == "emulated_amx_bf16.codebook4", "level ", level);
  }
  TestOps();
}
}  // namespace

int main() {
  unsetenv("QMOE_PLUGIN_CPU_ISA");
  TestRouting();
  TestOps();
  TestIsaVariable();
  TestEmulatedKernels();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
