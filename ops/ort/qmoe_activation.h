// What the activation attributes of a QMoE node mean, and how fc1 and fc3 feed the activation.
#pragma once

#include <cstdint>

#include "ops/ort/qmoe_node.h"
#include "ops/problem.h"

namespace qmoe_plugin::ort {

struct ActivationPlan {
  ActivationParams params;
  RowOrder order = RowOrder::kAsStored;
  int64_t rows_per_unit = 1;  // F: rows of fc1 for each value of the activation
};

/// Throws Error for values that are not allowed, or not together.
ActivationPlan PlanActivation(const QMoeAttributes& attributes, bool has_fc3);

}  // namespace qmoe_plugin::ort
