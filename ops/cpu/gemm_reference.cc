// The portable kernel: plain C++ in the words of gemm.h. Runs where there is no faster one, and is
// what the tests compare the others with.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"
#include "ops/dtype.h"

namespace qmoe_plugin {
namespace {

using cpu::kPanelRows;

/// K of one dequantised stretch; also the longest run of products that is added up in one go.
constexpr int64_t kStretch = 128;

/// The number that a code is.
template <int Bits, Codes kCodes>
float Number(uint32_t code, const float* table) {
  if constexpr (kCodes == Codes::kFloat16)
    return HalfToFloat(uint16_t(code));
  else if constexpr (kCodes == Codes::kBFloat16)
    return BFloat16ToFloat(uint16_t(code));
  else if constexpr (kCodes == Codes::kFloat32)
    return std::bit_cast<float>(code);
  else
    return table[code & ((1u << Bits) - 1)];
}

/// One panel of GemmArgs.
template <int Bits, Codes kCodes>
class Panel {
 public:
  Panel(const GemmArgs& args, int64_t panel) : args_(args), panel_(panel) {
    groups_ = args.block_size ? args.k_padded / args.block_size : 0;
  }

  int64_t groups() const { return groups_; }

  /// Scale of output row n in block g.
  float Scale(int64_t g, int n) const {
    return groups_ ? Value(args_.block_scales, panel_ * groups_ + g, n) : 1.0f;
  }

  /// Centered values plus zero offsets of k in [first, last), which lie in block g: w[k -
  /// first][n].
  void Decode(int64_t first, int64_t last, int64_t g, float (*w)[kPanelRows]) const {
    constexpr int kInDword = 32 / Bits;
    const uint8_t* codes = args_.codes + panel_ * (args_.k_padded * kPanelRows * Bits / 8);
    float offsets[kPanelRows] = {};
    if (args_.zero_offsets)
      for (int n = 0; n < kPanelRows; ++n)
        offsets[n] = Value(args_.zero_offsets, panel_ * std::max<int64_t>(groups_, 1) + g, n);
    for (int64_t k = first; k < last; ++k) {
      const int shift = cpu::CodeShift(Bits, int(k % kInDword));
      for (int n = 0; n < kPanelRows; ++n) {
        uint32_t dword;
        std::memcpy(&dword, codes + k / kInDword * 64 + 4 * n, sizeof dword);
        w[k - first][n] = Number<Bits, kCodes>(dword >> shift, args_.table) + offsets[n];
      }
    }
  }

 private:
  float Value(const void* section, int64_t block, int n) const {
    return LoadFloat(section, args_.half_scales ? DType::kFloat16 : DType::kFloat32,
                     size_t(block * kPanelRows + n));
  }

  const GemmArgs& args_;
  const int64_t panel_;
  int64_t groups_;
};

/// total[n] += sum over k in [first, last) of x[k] * w[k - first][n], times the scales.
void AddBlock(const float* x, int64_t first, int64_t last, const float (*w)[kPanelRows],
              const float* scales, float* total) {
  float sum[kPanelRows] = {};
  for (int64_t k = first; k < last; ++k)
    for (int n = 0; n < kPanelRows; ++n) sum[n] += w[k - first][n] * x[k];
  for (int n = 0; n < kPanelRows; ++n) total[n] += sum[n] * scales[n];
}

/// Adds block g, columns [first, last), of one panel to the totals of all rows, in y.
template <class P>
void AddBlockToRows(const GemmArgs& args, const P& panel, int64_t first, int64_t last, int64_t g,
                    float* y) {
  float w[kStretch][kPanelRows], scales[kPanelRows];
  panel.Decode(first, last, g, w);
  for (int n = 0; n < kPanelRows; ++n) scales[n] = panel.Scale(g, n);
  for (int64_t r = 0; r < args.rows; ++r) {
    const float* x =
        reinterpret_cast<const float*>(static_cast<const uint8_t*>(args.x) +
                                       (args.row_index ? args.row_index[r] : r) * args.row_bytes);
    AddBlock(x, first, last, w, scales, y + r * args.ldy);
  }
}

template <int Bits, Codes kCodes>
void Gemm(const GemmArgs& args) {
  for (int64_t p = 0; p < args.panels; ++p) {
    const Panel<Bits, kCodes> panel(args, p);
    float* const y = args.y + p * kPanelRows;
    for (int64_t r = 0; r < args.rows; ++r) std::fill_n(y + r * args.ldy, kPanelRows, 0.0f);
    const int64_t block = args.block_size ? args.block_size : args.k_padded;
    for (int64_t first = 0; first < args.k_padded;) {
      const int64_t g = first / block;
      const int64_t last = std::min(first + kStretch, (g + 1) * block);
      AddBlockToRows(args, panel, first, last, g, y);
      first = last;
    }
    for (int64_t r = 0; r < args.rows; ++r) {
      for (int n = 0; n < kPanelRows; ++n) {
        float& value = y[r * args.ldy + n];
        value *= args.row_scales[p * kPanelRows + n];
        if (args.bias) value += args.bias[p * kPanelRows + n];
      }
    }
  }
}

GemmFunction SelectGemm(int bits, Codes codes) {
  if (codes == Codes::kFloat16) return Gemm<16, Codes::kFloat16>;
  if (codes == Codes::kBFloat16) return Gemm<16, Codes::kBFloat16>;
  if (codes == Codes::kFloat32) return Gemm<32, Codes::kFloat32>;
  constexpr Codes kTable = Codes::kTable;
  return bits == 2 ? Gemm<2, kTable> : bits == 4 ? Gemm<4, kTable> : Gemm<8, kTable>;
}

float TimesSigmoid(float x, float z) { return x / (1.0f + std::exp(-z)); }

float GeluTanh(float x) {
  const float z = 0.797884561f * (x + 0.044715f * x * x * x);
  return TimesSigmoid(x, 2 * z);  // 0.5 x (1 + tanh z)
}

float Ungated(Activation type, float x) {
  switch (type) {
    case Activation::kRelu:
      return x < 0 ? 0.0f : x;  // NaN stays NaN
    case Activation::kGelu:
      return 0.5f * x * float(std::erfc(-x / std::sqrt(2.0)));
    case Activation::kSilu:
      return TimesSigmoid(x, x);
    default:
      return x;
  }
}

float Gated(const ActivationParams& params, float gate, float up) {
  if (params.type == Activation::kGeglu) return GeluTanh(gate) * up;
  // NaN is above and below nothing, and stays.
  if (gate > params.gate_limit) gate = params.gate_limit;
  float activated = TimesSigmoid(gate, params.alpha * gate);
  if (activated > params.activated_limit) activated = params.activated_limit;
  if (up > params.up_limit) up = params.up_limit;
  if (up < -params.up_limit) up = -params.up_limit;
  return activated * (up + params.beta);
}

void Activate(const ActivationParams& params, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i)
    y[i] =
        IsGated(params.type) ? Gated(params, x[2 * i], x[2 * i + 1]) : Ungated(params.type, x[i]);
}

void AddScaled(float factor, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

void ToFloat(const void* x, DType dtype, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = LoadFloat(x, dtype, size_t(i));
}

void FromFloat(const float* x, int64_t n, DType dtype, void* y) {
  for (int64_t i = 0; i < n; ++i) StoreFloat(y, dtype, size_t(i), x[i]);
}

}  // namespace

const CpuIsa kCpuReference = {.name = "reference",
                              .gemm = SelectGemm,
                              .activate = Activate,
                              .add_scaled = AddScaled,
                              .to_float = ToFloat,
                              .from_float = FromFloat};

}  // namespace qmoe_plugin
