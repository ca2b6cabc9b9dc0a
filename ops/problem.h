// The plain structs that kernels see, free of ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "ops/device.h"
#include "ops/dtype.h"
#include "ops/weights.h"

namespace qmoe_plugin {

/// Activation between fc1 and fc2. The gated ones take (gate, up) pairs: fc1 has 2 * inter_size
/// rows.
enum class Activation {
  kIdentity,
  kRelu,
  kGelu,    // 0.5 x (1 + erf(x / sqrt 2))
  kSilu,    // x sigmoid(x)
  kSwiglu,  // min(g sigmoid(alpha g), activated_limit) (u + beta) with g = min(gate, gate_limit)
            // and u = clamp(up, -up_limit, up_limit)
  kGeglu,   // tanh-GELU(gate) * up
};

constexpr bool IsGated(Activation a) { return a == Activation::kSwiglu || a == Activation::kGeglu; }

struct ActivationParams {
  Activation type = Activation::kRelu;
  float alpha = 1.0f;
  float beta = 0.0f;
  // Infinite: no limit. Nodes have one number for the ups and for one of the other two.
  float gate_limit = std::numeric_limits<float>::infinity();
  float activated_limit = std::numeric_limits<float>::infinity();
  float up_limit = std::numeric_limits<float>::infinity();
};

/// What is done to the activations that a GEMM reads (x before fc1, the activated values before
/// fc2): they are quantised to e4m3 and dequantised, ops/qmoe/activation_quant.h says how.
enum class ActivationQuant {
  kNone,
  kMxFp8,  // a power of two for each 32 values along K, found at run time (OCP MX)
  kFp8,    // a given scale an expert
};

/// How accurate the arithmetic must be (attribute accuracy_level): 0 to 2 exact activations, 3
/// allows bf16, 4 int8.
using AccuracyLevel = int;

/// What a QMoE node computes, apart from its weights. Checked by MakeQMoe.
struct MoeConfig {
  DType dtype = DType::kFloat32;  // activations and output: float32, float16 or bfloat16
  int64_t hidden_size = 0;        // H
  int64_t inter_size = 0;         // I
  int64_t experts = 0;            // E, 1 to 1024
  int64_t topk = 1;               // experts that a token goes to, the shared ones among them
  int64_t shared_experts = 0;     // S: the last S experts take every token, the others are routed
  bool normalize_routing_weights = false;
  bool use_sparse_mixer = false;  // there must be 2 routed experts a token
  ActivationParams activation;
  AccuracyLevel accuracy_level = 0;
  ActivationQuant activation_quant = ActivationQuant::kNone;
  /// Scales of each expert's activations in fc1 and fc2, which become e4m3(x / scale) * scale: E
  /// positive values each for kFp8, else empty.
  std::vector<float> fc1_act_scales, fc2_act_scales;

  int64_t routed_experts() const { return experts - shared_experts; }
  /// Experts that are chosen for a token: k.
  int64_t routed_topk() const { return topk - shared_experts; }
};

/// The weights of a QMoE node as the model stores them.
struct MoeWeights {
  Projection fc1;  // [E, F * I, H], F = 2 when gates and ups are stored together
  RowOrder fc1_order = RowOrder::kAsStored;
  Projection fc2;  // [E, H, I]
  Projection fc3;  // [E, I, H] ups; only read for RowOrder::kTwoMatrices
};

/// The tensors of one run, in the device's memory.
struct MoeTensors {
  int64_t tokens = 0;                  // T, may be 0
  const void* input = nullptr;         // [T, H], config.dtype
  const void* router_probs = nullptr;  // [T, E] logits
  DType router_probs_dtype = DType::kFloat32;
  const void* router_weights = nullptr;  // optional [T, E]
  DType router_weights_dtype = DType::kFloat32;
  void* output = nullptr;  // [T, H], config.dtype; may be `input` itself
};

/// What a MatMulNBits node computes, apart from its weights. Y[M, N] = A[M, K] B^T + bias.
struct MatMulConfig {
  DType dtype = DType::kFloat32;
  int64_t n = 0, k = 0;
  AccuracyLevel accuracy_level = 0;
  /// If given, A is quantised: it becomes e4m3(A / scale) * scale. Positive.
  std::optional<float> act_scale = std::nullopt;

  ActivationQuant activation_quant() const {
    return act_scale ? ActivationQuant::kFp8 : ActivationQuant::kNone;
  }
};

struct MatMulTensors {
  int64_t m = 0;            // rows of A, may be 0
  const void* a = nullptr;  // [M, K], config.dtype
  void* y = nullptr;        // [M, N], config.dtype
};

/// Runs fn(i) for i in [0, total) on the session's thread pool and returns when all are done.
/// fn must not throw, nor start another parallel loop.
using ParallelFor = std::function<void(size_t total, const std::function<void(size_t)>& fn)>;

/// What a run may use. `workspace` has at least the bytes that WorkspaceBytes() asked for, 256-byte
/// aligned, in the device's memory; its content is undefined.
struct ExecutionContext {
  void* stream = nullptr;    // cudaStream_t; CUDA only
  ParallelFor parallel_for;  // CPU only
  void* workspace = nullptr;
};

/// Which part of which op a GEMM serves; kernels may differ in what they refuse.
enum class GemmStage { kFc1, kFc2, kDense };

/// All that kernel selection looks at: one (grouped) GEMM y = x W^T.
struct GemmProblem {
  GemmStage stage = GemmStage::kDense;
  DType dtype = DType::kFloat32;  // of x and y
  const Format* format = nullptr;
  int64_t experts = 1;
  int64_t rows = 0;  // rows of x over all experts: M, or tokens * topk
  int64_t topk = 1;  // rows of a token, each of another expert
  int sm = 0;        // of the device; set by Explain
  int64_t n = 0, k = 0;
  int64_t block_size = 0;  // 0 = per channel
  bool zero_points = false;
  Activation activation = Activation::kIdentity;  // applied in the epilogue; fc1 only
  AccuracyLevel accuracy_level = 0;
};

}  // namespace qmoe_plugin
