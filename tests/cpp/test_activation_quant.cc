// Activations as e4m3: rounding against a search over all codes, MX blocks against log2 in double,
// and a whole QMoE node on the CPU against double loops over quantised numbers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ops/common/float_codes.h"
#include "ops/error.h"
#include "ops/qmoe/activation_quant.h"
#include "ops/qmoe/qmoe.h"
#include "tests/cpp/expect.h"

namespace qmoe_plugin {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
std::mt19937 rng(7);

bool SameNumber(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

/// The nearest finite e4m3 number by trying all, the even code of two equally near ones.
float NearestE4M3(float x) {
  if (std::isnan(x)) return x;
  int best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (int code = 0; code < 0x7f; ++code) {
    const double distance = std::fabs(std::min(std::fabs(double(x)), 1e9) - DecodeE4M3(code));
    if (distance < best_distance || (distance == best_distance && code % 2 == 0))
      best = code, best_distance = distance;
  }
  return std::copysign(DecodeE4M3(uint32_t(best)), x);
}

void ExpectRounded(float x) {
  for (float value : {x, -x})
    EXPECT(SameNumber(RoundToE4M3(value), NearestE4M3(value)), "e4m3(", value, ") is ",
           RoundToE4M3(value), ", not ", NearestE4M3(value));
}

/// Every e4m3 number, the middle to its neighbour and what lies right beside both.
void TestRounding() {
  for (uint32_t code = 0; code < 0x7f; ++code) {
    const float value = DecodeE4M3(code);
    EXPECT(SameNumber(RoundToE4M3(value), value), "e4m3 code ", code, " becomes ",
           RoundToE4M3(value));
    const float next = code < 0x7e ? DecodeE4M3(code + 1) : 480.0f, middle = (value + next) / 2;
    for (float x : {value, middle})
      for (float to : {0.0f, kInfinity, x}) ExpectRounded(std::nextafter(x, to));
  }
  const float limits[] = {0.0f,    449.0f,  479.9f, 480.0f,    1e10f,
                          3.4e38f, 1e-45f,  1e-38f, 0x1p-10f,  0x1.8p-10f,
                          0x1p-9f, 0x1p-6f, 448.0f, kInfinity, 0x1.000002p-10f};
  for (float x : limits) ExpectRounded(x);
  EXPECT(RoundToE4M3(kInfinity) == 448 && RoundToE4M3(-1e30f) == -448, "saturation");
  EXPECT(std::signbit(RoundToE4M3(-0.0f)), "-0 lost its sign");
  EXPECT(std::isnan(RoundToE4M3(NAN)) && std::isnan(RoundToE4M3(-NAN)), "NaN");
  for (int i = 0; i < 200000; ++i) {
    const float x = std::bit_cast<float>(uint32_t(rng()));
    if (!std::isnan(x)) ExpectRounded(std::fabs(x));
  }
}

/// An MX block by the definition, in double.
std::vector<float> QuantizedBlock(const std::vector<float>& x) {
  double amax = 0;
  for (float v : x) amax = std::max(amax, std::fabs(double(v)));
  const int exponent = amax > 0 ? int(std::floor(std::log2(amax))) - 8 : -126;
  const double scale = std::ldexp(1.0, std::max(exponent, -126));
  std::vector<float> result;
  for (float v : x) result.push_back(float(NearestE4M3(float(v / scale)) * scale));
  return result;
}

void ExpectBlocks(const std::vector<float>& x, const std::string& what) {
  std::vector<float> got = x;
  QuantizeActivations(ActivationQuant::kMxFp8, 1.0f, int64_t(x.size()), got.data());
  for (size_t first = 0; first < x.size(); first += kMxBlock) {
    const size_t end = std::min(first + kMxBlock, x.size());
    const std::vector<float> expected = QuantizedBlock({x.begin() + first, x.begin() + end});
    for (size_t i = first; i < end; ++i)
      EXPECT(SameNumber(got[i], expected[i - first]), what, ": ", x[i], " becomes ", got[i],
             ", not ", expected[i - first]);
  }
}

void TestBlocks() {
  std::normal_distribution<float> gauss;
  for (int exponent = -148; exponent <= 127; ++exponent) {
    std::vector<float> x(70);  // two blocks and a partial one
    for (float& v : x) v = std::ldexp(gauss(rng) / 8, exponent);
    x[33] = std::ldexp(1.0f, exponent);  // a power of two as the largest
    ExpectBlocks(x, Concat("2^", exponent));
  }
  ExpectBlocks(std::vector<float>(32, 0.0f), "zeros");
  ExpectBlocks({-0.0f, 0.0f, 1e-45f, -1e-45f}, "the smallest float");
  ExpectBlocks({3.4e38f, -3.4e38f, 1.0f}, "the largest float");
  for (float bad : {kInfinity, -kInfinity, NAN}) {
    std::vector<float> x(96, 1.0f);
    x[40] = bad;
    QuantizeActivations(ActivationQuant::kMxFp8, 1.0f, 96, x.data());
    for (int i = 0; i < 96; ++i)
      EXPECT(std::isnan(x[i]) == (i / 32 == 1), bad, " in block 1: value ", i, " is ", x[i]);
  }
}

float RoundedTo(DType dtype, float x) {
  float stored;  // large enough for all types
  StoreFloat(&stored, dtype, 0, x);
  return LoadFloat(&stored, dtype, 0);
}

/// 16-bit activations stay in their type: whatever the block's scale, the result is one of its
/// numbers.
void TestFits(DType dtype) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const float x =
        dtype == DType::kFloat16 ? HalfToFloat(uint16_t(code)) : BFloat16ToFloat(uint16_t(code));
    if (!std::isfinite(x)) continue;
    for (int up = 0; up < 20; ++up) {
      const float largest = std::ldexp(x, up);
      if (std::isinf(largest) || RoundedTo(dtype, largest) != largest) break;  // beyond the type
      const float y = QuantizeMx(x, MxScaleOf(MagnitudeBits(largest)));
      EXPECT(RoundedTo(dtype, y) == y, Name(dtype), " ", x, " beside ", largest, " becomes ", y);
    }
  }
}

/// A relu node whose sums fc1 are exact in float32, so that the quantised hidden values are known.
struct Node {
  static constexpr int64_t kExperts = 3, kHidden = 80, kInter = 144, kTopk = 2;
  MoeConfig config;
  std::vector<uint8_t> codes1, codes2;
  std::vector<float> scales1, scales2;
  MoeWeights weights;

  Node(DType dtype, ActivationQuant quant, std::vector<float> act1, std::vector<float> act2) {
    config = {.dtype = dtype,
              .hidden_size = kHidden,
              .inter_size = kInter,
              .experts = kExperts,
              .topk = kTopk,
              .normalize_routing_weights = true,
              .activation = {.type = Activation::kRelu},
              .activation_quant = quant,
              .fc1_act_scales = act1,
              .fc2_act_scales = act2};
    weights.fc1 = Matrix("fc1", kInter, kHidden, codes1, scales1);
    weights.fc2 = Matrix("fc2", kHidden, kInter, codes2, scales2);
  }

  static Projection Matrix(const char* name, int64_t n, int64_t k, std::vector<uint8_t>& codes,
                           std::vector<float>& scales) {
    codes.resize(size_t(kExperts * n * k / 2));
    for (uint8_t& code : codes) code = uint8_t(rng());
    scales.resize(size_t(kExperts * n * k / 16));
    for (float& scale : scales) scale = std::ldexp(1.0f, int(rng() % 3) - 4);
    return {.name = name,
            .format = &GetFormat("int4"),
            .experts = kExperts,
            .n = n,
            .k = k,
            .block_size = 16,
            .codes = {codes.data(), DType::kUint8, {kExperts, n, k / 2}, true},
            .scales = {scales.data(), DType::kFloat32, {kExperts, n, k / 16}, true}};
  }

  static double Weight(const Projection& p, int64_t row, int64_t k) {
    const uint8_t byte = static_cast<const uint8_t*>(p.codes.data)[(row * p.k + k) / 2];
    const int code = k % 2 ? byte >> 4 : byte & 15;
    return (code - 8) * static_cast<const float*>(p.scales.data)[(row * p.k + k) / 16];
  }

  /// x as a GEMM of the expert reads it, in double.
  std::vector<double> Quantized(std::vector<float> x, const std::vector<float>& scales,
                                int64_t expert) const {
    std::vector<double> result;
    if (config.activation_quant == ActivationQuant::kFp8) {
      const float scale = scales[size_t(expert)];
      for (float v : x) result.push_back(double(NearestE4M3(v / scale)) * scale);
      return result;
    }
    for (size_t first = 0; first < x.size(); first += kMxBlock) {
      const size_t end = std::min(first + kMxBlock, x.size());
      for (float v : QuantizedBlock({x.begin() + first, x.begin() + end})) result.push_back(v);
    }
    return result;
  }

  std::vector<double> Expert(int64_t expert, const std::vector<float>& x) const {
    const std::vector<double> x1 = Quantized(x, config.fc1_act_scales, expert);
    std::vector<float> h(kInter);
    for (int64_t i = 0; i < kInter; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < kHidden; ++k)
        sum += x1[k] * Weight(weights.fc1, expert * kInter + i, k);
      h[i] = RoundedTo(config.dtype, float(std::max(sum, 0.0)));
    }
    const std::vector<double> x2 = Quantized(h, config.fc2_act_scales, expert);
    std::vector<double> y(kHidden);
    for (int64_t n = 0; n < kHidden; ++n)
      for (int64_t k = 0; k < kInter; ++k)
        y[n] += x2[k] * Weight(weights.fc2, expert * kHidden + n, k);
    return y;
  }
};

void TestNode(const Node& node, const std::string& what) {
  const int64_t tokens = 60, hidden = Node::kHidden, experts = Node::kExperts;
  std::vector<float> x(tokens * hidden), logits(tokens * experts), stored(x.size()), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = float(int(rng() % 129) - 64) / 16;
    StoreFloat(stored.data(), node.config.dtype, i, x[i]);  // exact in all types
  }
  for (int64_t i = 0; i < tokens * experts; ++i) logits[i] = float(rng() % 7);
  const auto op = MakeQMoe(Device{}, node.config, node.weights);
  std::vector<uint8_t> workspace(op->WorkspaceBytes(tokens) + 64, 0xff);
  ExecutionContext context;
  context.workspace =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  context.parallel_for = [](size_t total, const std::function<void(size_t)>& fn) {
    for (size_t i = 0; i < total; ++i) fn(i);
  };
  MoeTensors tensors;
  tensors.tokens = tokens;
  tensors.input = stored.data();
  tensors.router_probs = logits.data();
  tensors.output = y.data();
  op->Run(tensors, context);
  const double tolerance = node.config.dtype == DType::kFloat32   ? 2e-6
                           : node.config.dtype == DType::kFloat16 ? 1e-3
                                                                  : 8e-3;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* l = &logits[t * experts];
    std::vector<int64_t> order{0, 1, 2};
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return l[a] > l[b]; });
    const double share = 1 / (1 + std::exp(double(l[order[1]]) - l[order[0]]));
    const std::vector<float> row(x.begin() + t * hidden, x.begin() + (t + 1) * hidden);
    const std::vector<double> a = node.Expert(order[0], row), b = node.Expert(order[1], row);
    double largest = 0;
    for (double v : a) largest = std::max(largest, std::fabs(v));
    for (int64_t n = 0; n < hidden; ++n) {
      const double expected = share * a[n] + (1 - share) * b[n];
      const float got = LoadFloat(y.data(), node.config.dtype, size_t(t * hidden + n));
      EXPECT(std::fabs(got - expected) <= tolerance * largest, what, ": y[", t, ", ", n,
             "] = ", got, ", not ", expected);
    }
  }
}

void TestNodes() {
  // Factors with few bits, so that the sums stay exact.
  const std::vector<float> same{0.75f, 0.75f, 0.75f}, other{0.5f, 0.03125f, 3.0f};
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const std::string type = Name(dtype);
    TestNode({dtype, ActivationQuant::kMxFp8, {}, {}}, "MXFP8 " + type);
    TestNode({dtype, ActivationQuant::kFp8, same, same}, "FP8, one scale " + type);
    TestNode({dtype, ActivationQuant::kFp8, same, other}, "FP8, fc2 by expert " + type);
    TestNode({dtype, ActivationQuant::kFp8, other, other}, "FP8 by expert " + type);
  }
}

void TestRefusals() {
  const auto refusal = [](ActivationQuant quant, std::vector<float> a, std::vector<float> b) {
    const Node node(DType::kFloat32, quant, a, b);
    try {
      MakeQMoe(Device{}, node.config, node.weights);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const std::vector<float> good{1, 1, 1}, zero{1, 0, 1}, two{1, 1}, infinite{1, 1, kInfinity};
  const auto expect = [](const std::string& got, const char* part) {
    EXPECT(got.find(part) != std::string::npos, "'", got, "' should contain '", part, "'");
  };
  expect(refusal(ActivationQuant::kFp8, good, zero), "fc2_act_scale holds 0");
  expect(refusal(ActivationQuant::kFp8, infinite, good), "fc1_act_scale holds inf");
  expect(refusal(ActivationQuant::kFp8, two, good), "fc1_act_scale has 2 values");
  expect(refusal(ActivationQuant::kFp8, good, {}), "fc2_act_scale has 0 values");
  expect(refusal(ActivationQuant::kMxFp8, good, good), "fc1_act_scale has 3 values");
}

int Main() {
  TestRounding();
  TestBlocks();
  TestFits(DType::kFloat16);
  TestFits(DType::kBFloat16);
  TestNodes();
  TestRefusals();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

}  // namespace
}  // namespace qmoe_plugin

int main() { return qmoe_plugin::Main(); }
