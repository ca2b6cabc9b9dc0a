// The QMoE op, free of ONNX Runtime: make one per node (that packs the weights), run it any number
// of times.
//
//   p = softmax(router_probs) over the routed experts in float32; the k largest logits win, the
//   lower index first on ties. scale_j = p_j, or p_j / sum of the selected p when
//   normalize_routing_weights (only if that sum > 1e-6); with router_weights: selection by
//   router_probs, scale_j = router_weights_j, divided by their sum when normalizing. Shared experts
//   follow, in order, with scale_j = sigmoid(router_probs_j).
//   y = sum_j scale_j * (activation(x W1_j^T + b1_j) W2_j^T + b2_j), accumulated in float32 in the
//   order of j
//
// docs/semantics.md says where this differs from the stock ops.
#pragma once

#include <memory>
#include <vector>

#include "ops/pack_source.h"
#include "ops/problem.h"

namespace qmoe_plugin {

class QMoe {
 public:
  virtual ~QMoe() = default;

  /// Scratch memory of a run with this many tokens, on the device.
  virtual size_t WorkspaceBytes(int64_t tokens) const = 0;

  /// Headers of the packed weights, fc1 and fc2: what they are and how large, for the log.
  virtual std::vector<PackedHeader> Packed() const = 0;

  /// Runs (CUDA: enqueues on the stream, without ever synchronizing or allocating). Thread-safe.
  virtual void Run(const MoeTensors& tensors, const ExecutionContext& context) const = 0;
};

/// Checks everything, selects kernels and packs. The weights may be released afterwards, except for
/// those that are packed already and the CPU's. Throws Error.
std::unique_ptr<QMoe> MakeQMoe(const Device& device, const MoeConfig& config,
                               const MoeWeights& weights);

/// Packs a node's weights for a device, which need not be here: fc1 (gates and ups interleaved),
/// then fc2. MakeQMoe takes them as Projection::packed, with fc1_order kAsStored. Throws Error.
void PrepackQMoe(const Device& device, const MoeConfig& config, const MoeWeights& weights,
                 const AllocatePacked& allocate);

/// Readers over the packed rows of fc1 (gates and ups interleaved) and fc2, after checking that
/// shapes agree. They read the config's activation scales too.
RowReader MakeFc1Reader(const MoeConfig& config, const MoeWeights& weights);
RowReader MakeFc2Reader(const MoeConfig& config, const MoeWeights& weights);

// One implementation a device; MakeQMoe checks the config and calls one of them.
std::unique_ptr<QMoe> MakeCpuQMoe(const MoeConfig& config, const PackSource& fc1,
                                  const PackSource& fc2);
std::unique_ptr<QMoe> MakeCudaQMoe(const Device& device, const MoeConfig& config,
                                   const PackSource& fc1, const PackSource& fc2);

}  // namespace qmoe_plugin
