// Routing: which experts a token goes to, and with what weights.
#pragma once

#include <cuda_runtime.h>

#include "ops/dtype.h"

namespace qmoe_plugin {

/// Kernels before fc1 cut the tokens into slices, at most so many, and a block takes one.
inline constexpr int kMaxSlices = 128;
constexpr int SliceTokens(int tokens) { return (tokens - 1) / kMaxSlices + 1; }
constexpr int Slices(int tokens) { return (tokens - 1) / SliceTokens(tokens) + 1; }

struct RouteArgs {
  const void* logits;   // [T, E]
  DType logits_dtype;   // float32, float16 or bfloat16
  const void* weights;  // router_weights [T, E], or null
  DType weights_dtype;
  int tokens, experts, topk;
  int shared;         // the last so many experts take every token; they count in experts and topk
  bool normalize;     // divide the scales of routed experts by their sum, if that is above 1e-6
  bool sparse_mixer;  // there are 2 routed experts a token
  int* expert_ids;    // [T, k]
  float* scales;      // [T, k]
};

/// Experts of a token are the largest logits of routed experts, the lower index first among equals;
/// NaN is below everything. Their scales are softmax probabilities over all routed experts, or
/// router_weights at those experts. Shared experts follow, their scales are sigmoids of their
/// logits. NaN logits give NaN scales.
///
/// slice_counts [Slices(T), E]: so many tokens of each slice go to each expert, for LaunchPermute.
void LaunchRoute(const RouteArgs& args, int* slice_counts, cudaStream_t stream);
void PrepareRoute();

}  // namespace qmoe_plugin
