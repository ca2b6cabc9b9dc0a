// What a kernel reads of its node when it is made: name, attributes, constant inputs, device.
#pragma once

#include <chrono>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ops/device.h"
#include "ops/ort/attributes.h"
#include "ops/ort/custom_op.h"
#include "ops/packed_weights.h"
#include "ops/weights.h"

namespace qmoe_plugin::ort {

class NodeInfo : public Attributes {
 public:
  NodeInfo(const CustomOp& op, const OrtKernelInfo* info);

  /// The node's name, or the name of its output for a node that has none.
  const std::string& name() const { return name_; }
  DType dtype() const { return op_.dtype(); }
  const Device& device() const { return device_; }

  std::optional<int64_t> FindInt(const char* attribute) const override;
  std::optional<float> FindFloat(const char* attribute) const override;
  std::optional<std::string> FindString(const char* attribute) const override;

  bool HasInput(size_t index) const;

  /// All inputs that the op's spec calls constant, by input number; an optional one that was left
  /// out is not `present`. Throws Error for one that is missing, not constant, not in host memory,
  /// or of another size than its shape says.
  std::vector<TensorView> ConstantInputs() const;

  /// Writes to the session's log, if it wants messages of this severity.
  void Log(OrtLoggingLevel severity, const std::string& message) const;

  /// The one line that the log gets of every node: what was packed, or loaded as it was packed
  /// before, and the time since this object was made.
  void LogPacked(std::span<const PackedHeader> weights, bool before) const;

 private:
  TensorView ConstantInput(size_t index) const;
  void RefuseOtherType(const char* attribute, const char* wanted) const;

  const CustomOp& op_;
  const Api& api_;
  const OrtKernelInfo* info_;
  std::string name_;
  Device device_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace qmoe_plugin::ort
