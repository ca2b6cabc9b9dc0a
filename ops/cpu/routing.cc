#include "ops/cpu/routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace qmoe_plugin::cpu {
namespace {

/// A sum of factors below this is not divided by: all of them are noise.
constexpr float kSmallestSum = 1e-6f;
/// Half the relative distance to the best logit that the sparse mixer still counts in.
constexpr float kJitter = 0.01f;

/// Whether a comes before b in falling order, NaN last.
bool Before(float a, float b) { return a > b || (std::isnan(b) && !std::isnan(a)); }

/// The best logits of routed experts, the lower index first on ties.
void SelectTopK(const MoeConfig& config, const float* logits, int32_t* expert_ids) {
  const int64_t experts = config.routed_experts(), topk = config.routed_topk();
  int32_t order[kMaxExperts];
  std::iota(order, order + experts, 0);
  std::partial_sort(order, order + topk, order + experts, [logits](int32_t a, int32_t b) {
    if (Before(logits[a], logits[b])) return true;
    return !Before(logits[b], logits[a]) && a < b;
  });
  std::copy_n(order, topk, expert_ids);
}

/// Softmax probabilities, over all routed experts, of the chosen ones. expert_ids[0] has the best logit.
void ChosenProbabilities(const MoeConfig& config, const float* logits, const int32_t* expert_ids,
                         float* factors) {
  const float best = logits[expert_ids[0]];
  float sum = 0;
  for (int64_t e = 0; e < config.routed_experts(); ++e) sum += std::exp(logits[e] - best);
  for (int64_t j = 0; j < config.routed_topk(); ++j)
    factors[j] = std::exp(logits[expert_ids[j]] - best) / sum;
}

void Normalize(const MoeConfig& config, float* factors) {
  const float sum = std::accumulate(factors, factors + config.routed_topk(), 0.0f);
  if (sum > kSmallestSum)
    for (int64_t j = 0; j < config.routed_topk(); ++j) factors[j] /= sum;
}

/// Twice: the best logit left, and its probability among those left that are close to it. The two
/// factors are independent of each other (Phi-3.5-MoE).
void RouteSparseMixer(const MoeConfig& config, const float* logits, int32_t* expert_ids,
                      float* factors) {
  SelectTopK(config, logits, expert_ids);
  for (int choice = 0; choice < 2; ++choice) {
    const float best = logits[expert_ids[choice]];
    float sum = 0;
    for (int64_t e = 0; e < config.routed_experts(); ++e) {
      if (choice == 1 && e == expert_ids[0]) continue;
      const float x = logits[e];
      const float distance = (best - x) / std::max(std::fabs(x), std::fabs(best));
      if (!(distance > 2 * kJitter)) sum += std::exp(x - best);
    }
    factors[choice] = 1.0f / sum;
  }
}

void RouteTopK(const MoeConfig& config, const float* logits, const float* router_weights,
               int32_t* expert_ids, float* factors) {
  SelectTopK(config, logits, expert_ids);
  if (router_weights == nullptr) {
    ChosenProbabilities(config, logits, expert_ids, factors);
  } else {
    for (int64_t j = 0; j < config.routed_topk(); ++j) factors[j] = router_weights[expert_ids[j]];
  }
  if (config.normalize_routing_weights) Normalize(config, factors);
}

}  // namespace

void RouteToken(const MoeConfig& config, const float* logits, const float* router_weights,
                int32_t* expert_ids, float* factors) {
  if (config.use_sparse_mixer && router_weights == nullptr)
    RouteSparseMixer(config, logits, expert_ids, factors);
  else
    RouteTopK(config, logits, router_weights, expert_ids, factors);
  for (int64_t j = config.routed_topk(), e = config.routed_experts(); e < config.experts;
       ++j, ++e) {
    expert_ids[j] = int32_t(e);
    factors[j] = 1.0f / (1.0f + std::exp(-logits[e]));
  }
}

}  // namespace qmoe_plugin::cpu
