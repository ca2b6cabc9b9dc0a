// Which experts a token goes to, and with which factor: ops/qmoe/qmoe.h has the formulas.
#pragma once

#include <cstdint>

#include "ops/problem.h"

namespace qmoe_plugin::cpu {

inline constexpr int64_t kMaxExperts = 1024;

/// Routes one token. `logits` [E] and, unless null, `router_weights` [E] are its rows; expert_ids
/// and factors [topk] are written in order of falling logits, shared experts at the end. NaN compares lower than anything and
/// makes the factors NaN, but ids are always distinct and in [0, E).
void RouteToken(const MoeConfig& config, const float* logits, const float* router_weights,
                int32_t* expert_ids, float* factors);

}  // namespace qmoe_plugin::cpu
