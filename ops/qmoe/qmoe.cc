#include "ops/qmoe/qmoe.h"

#include <cmath>

#include "ops/error.h"

namespace qmoe_plugin {
namespace {

constexpr int64_t kMaxExperts = 1024;

void CheckActivationScales(const MoeConfig& c, const char* name, const std::vector<float>& scales) {
  const size_t wanted = c.activation_quant == ActivationQuant::kFp8 ? size_t(c.experts) : 0;
  QMOE_REQUIRE(scales.size() == wanted, name, " has ", scales.size(), " values; this node needs ",
               wanted, wanted ? ", one an expert" : ", as its activations are not scaled by them");
  for (float scale : scales)
    QMOE_REQUIRE(scale > 0 && std::isfinite(scale), name, " holds ", scale,
                 "; scales of activations must be positive and finite");
}

void CheckConfig(const MoeConfig& c) {
  QMOE_REQUIRE(IsFloat(c.dtype), "activations are ", Name(c.dtype),
               "; allowed are float32, float16 and bfloat16");
  QMOE_REQUIRE(c.hidden_size > 0 && c.inter_size > 0, "hidden_size ", c.hidden_size,
               " and inter_size ", c.inter_size, " must be positive");
  QMOE_REQUIRE(c.experts >= 1 && c.experts <= kMaxExperts, "the node has ", c.experts,
               " experts; allowed are 1 to ", kMaxExperts);
  QMOE_REQUIRE(c.shared_experts >= 0 && c.shared_experts < c.experts, "num_shared_experts is ",
               c.shared_experts, "; it must be from 0 to ", c.experts - 1, ", as one of the ",
               c.experts, " experts at least must be routed");
  QMOE_REQUIRE(c.routed_topk() >= 1 && c.routed_topk() <= c.routed_experts(), "k is ",
               c.routed_topk(), "; it must be from 1 to the number of ",
               c.shared_experts ? "routed " : "", "experts, ", c.routed_experts());
  QMOE_REQUIRE(!c.use_sparse_mixer || c.routed_topk() == 2,
               "use_sparse_mixer=1 needs k=2, not k=", c.routed_topk());
  QMOE_REQUIRE(c.accuracy_level >= 0 && c.accuracy_level <= 4, "accuracy_level is ",
               c.accuracy_level, "; allowed are 0 to 4");
  CheckActivationScales(c, "fc1_act_scale", c.fc1_act_scales);
  CheckActivationScales(c, "fc2_act_scale", c.fc2_act_scales);
}

void CheckProjectionShape(const Projection& p, int64_t experts, int64_t n, int64_t k) {
  QMOE_REQUIRE(p.experts == experts && p.n == n && p.k == k, p.name, " holds ", p.experts, " x ",
               p.n, " x ", p.k, " weights; this node needs ", experts, " x ", n, " x ", k,
               " = [experts, rows, columns]");
}

/// The projection with the activation scales, which the config goes on to own, as factors on its
/// sums.
Projection WithActivationScales(const Projection& p, const std::vector<float>& scales) {
  Projection scaled = p;
  if (!scales.empty())
    scaled.sum_scale = {scales.data(), DType::kFloat32, {int64_t(scales.size())}, true};
  return scaled;
}

/// Rows of a packed fc1: gates and ups together, however the model stored them.
int64_t Fc1Rows(const MoeConfig& c) { return c.inter_size * (IsGated(c.activation.type) ? 2 : 1); }

}  // namespace

RowReader MakeFc1Reader(const MoeConfig& config, const MoeWeights& weights) {
  const bool two_matrices = weights.fc1_order == RowOrder::kTwoMatrices;
  QMOE_REQUIRE(
      !two_matrices || IsGated(config.activation.type),
      "fc3 is given, but the activation is not gated; leave fc3 out, or use swiglu or geglu");
  const int64_t rows = two_matrices ? config.inter_size : Fc1Rows(config);
  CheckProjectionShape(weights.fc1, config.experts, rows, config.hidden_size);
  const Projection fc1 = WithActivationScales(weights.fc1, config.fc1_act_scales);
  if (!two_matrices) return RowReader(fc1, weights.fc1_order);
  CheckProjectionShape(weights.fc3, config.experts, rows, config.hidden_size);
  return RowReader(fc1, weights.fc3);
}

RowReader MakeFc2Reader(const MoeConfig& config, const MoeWeights& weights) {
  CheckProjectionShape(weights.fc2, config.experts, config.hidden_size, config.inter_size);
  return RowReader(WithActivationScales(weights.fc2, config.fc2_act_scales));
}

namespace {

PackSource PackedSource(const MoeConfig& config, const Projection& p, int64_t n, int64_t k) {
  const PackSource source(p);
  QMOE_REQUIRE(source.experts() == config.experts && source.rows() == n && source.k() == k, p.name,
               " packed weights are ", source.experts(), " x ", source.rows(), " x ", source.k(),
               "; this node needs ", config.experts, " x ", n, " x ", k,
               " = [experts, rows, columns]");
  const bool scaled = config.activation_quant == ActivationQuant::kFp8;
  QMOE_REQUIRE(source.has_sum_scale() == scaled, p.name, " weights were packed ",
               scaled ? "without" : "with", " activation scales, which this node ",
               scaled ? "has" : "does not have", "; prepack the model again");
  return source;
}

PackSource Fc1Source(const MoeConfig& c, const MoeWeights& weights) {
  if (!weights.fc1.packed.present) return PackSource(MakeFc1Reader(c, weights));
  QMOE_REQUIRE(weights.fc1_order != RowOrder::kTwoMatrices,
               "fc1 is packed, which has the ups in it; leave fc3 out");
  return PackedSource(c, weights.fc1, Fc1Rows(c), c.hidden_size);
}

PackSource Fc2Source(const MoeConfig& c, const MoeWeights& weights) {
  if (!weights.fc2.packed.present) return PackSource(MakeFc2Reader(c, weights));
  return PackedSource(c, weights.fc2, c.hidden_size, c.inter_size);
}

}  // namespace

std::unique_ptr<QMoe> MakeQMoe(const Device& device, const MoeConfig& config,
                               const MoeWeights& weights) {
  CheckConfig(config);
  const PackSource fc1 = Fc1Source(config, weights), fc2 = Fc2Source(config, weights);
  if (device.type == DeviceType::kCpu) return MakeCpuQMoe(config, fc1, fc2);
  return MakeCudaQMoe(device, config, fc1, fc2);
}

void PrepackQMoe(const Device& device, const MoeConfig& config, const MoeWeights& weights,
                 const AllocatePacked& allocate) {
  CheckConfig(config);
  const PackTarget target = TargetOf(device, config.dtype);
  const PackSource fc1 = Fc1Source(config, weights), fc2 = Fc2Source(config, weights);
  fc1.Prepack("fc1", IsGated(config.activation.type), target, allocate);
  fc2.Prepack("fc2", false, target, allocate);
}

}  // namespace qmoe_plugin
