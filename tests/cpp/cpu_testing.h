// What the C++ tests of the CPU kernels and ops share: random weights, and what they mean in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ops/cpu/gemm.h"
#include "ops/error.h"
#include "ops/registry.h"
#include "ops/weights.h"
#include "tests/cpp/expect.h"

namespace qmoe_plugin {

inline std::mt19937 rng(1);

/// Set by --quick: fewer rows and values, for processors that are emulated.
inline bool quick = false;

inline void ReadArguments(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) quick |= std::string(argv[i]) == "--quick";
}

/// What QMOE_PLUGIN_CPU_ISA may be here, from the lowest level on.
inline const std::vector<std::string> kLevels = {
    "reference",
#if defined(__x86_64__)
    "avx2",      "avxvnni", "avx512", "amx",
#elif defined(__aarch64__)
    "neon",
    "neon_dotprod",
    "neon_i8mm",
#endif
};

inline float Gauss() { return std::normal_distribution<float>()(rng); }

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
    if (s.bias) bias = Tensor(DType::kFloat32, {s.experts, s.n}, Gauss);
    projection.bias = bias.view;
    if (s.format->plain()) {
      codes = Tensor(s.format->plain_type, {s.experts, s.n, s.k}, Gauss);
      projection.codes = codes.view;
      return;
    }
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
  }
};

/// Dequantised rows of a reader, in double: [E, rows, k].
inline std::vector<double> Dequantize(const RowReader& reader) {
  const int64_t k = reader.k(), block = reader.block_size() ? reader.block_size() : k;
  const Format& format = reader.format();
  std::vector<uint8_t> codes(k * format.code_bytes());
  std::vector<float> scales(reader.groups()), offsets(reader.groups());
  const auto value = [&](int64_t i) {
    if (format.plain()) return double(LoadFloat(codes.data(), format.plain_type, size_t(i)));
    return double(reader.codebook().empty() ? format.centered[codes[i]]
                                            : reader.codebook()[codes[i]]);
  };
  std::vector<double> w;
  for (int64_t e = 0; e < reader.experts(); ++e) {
    for (int64_t row = 0; row < reader.rows(); ++row) {
      reader.Codes(e, row, codes.data());
      reader.Scales(e, row, scales.data());
      reader.ZeroOffsets(e, row, offsets.data());
      for (int64_t i = 0; i < k; ++i)
        w.push_back((value(i) + offsets[i / block]) * scales[i / block]);
    }
  }
  return w;
}

struct Reference {
  double value, magnitude;  // the sum, and the sum of its terms' magnitudes
};

inline Reference Dot(const double* w, const float* x, int64_t k) {
  Reference r{};
  for (int64_t i = 0; i < k; ++i) {
    r.value += w[i] * x[i];
    r.magnitude += std::fabs(w[i] * x[i]);
  }
  return r;
}

inline const std::vector<const Kernel*>& CpuKernels(const Format* format) {
  static std::vector<const Kernel*> kernels;
  kernels.clear();
  for (const Kernel* kernel : Kernels())
    if (kernel->device == DeviceType::kCpu && kernel->format == format && kernel->available())
      kernels.push_back(kernel);
  return kernels;
}

inline double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// What gpt-oss has; or a limit that cuts many gates after they were activated.
inline ActivationParams SomeParams(Activation type, bool limit_after) {
  ActivationParams params{.type = type, .alpha = 1.702f, .beta = 1.0f};
  params.up_limit = limit_after ? 0.5f : 7.0f;
  (limit_after ? params.activated_limit : params.gate_limit) = params.up_limit;
  return params;
}

inline double Activated(const ActivationParams& p, double gate, double up) {
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
      const double g = std::min<double>(gate, p.gate_limit);
      const double activated = std::min<double>(g * Sigmoid(p.alpha * g), p.activated_limit);
      return activated * (std::clamp<double>(up, -p.up_limit, p.up_limit) + p.beta);
    }
    case Activation::kGeglu:  // 0.5 (1 + tanh z) = sigmoid(2 z), which does not cancel
      return gate * up * Sigmoid(2 * std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate));
  }
  return 0;
}

/// Those that this processor has, each once.
inline std::vector<const CpuIsa*> Isas() {
  std::vector<const CpuIsa*> isas;
  for (const Kernel* kernel : CpuKernels(&GetFormat("float32")))
    isas.push_back(static_cast<const CpuGemm*>(kernel->launch)->isa);
  return isas;
}
}  // namespace qmoe_plugin
