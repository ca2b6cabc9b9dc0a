// The attributes of a node, whoever holds it: ONNX Runtime (node_info.h), or a caller that packs
// weights without a session (ops/capi_prepack.cc).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace qmoe_plugin::ort {

class Attributes {
 public:
  virtual ~Attributes() = default;

  /// An attribute, empty if the node does not have it. Throws Error if it has another type.
  virtual std::optional<int64_t> FindInt(const char* name) const = 0;
  virtual std::optional<float> FindFloat(const char* name) const = 0;
  virtual std::optional<std::string> FindString(const char* name) const = 0;

  int64_t Int(const char* name, int64_t otherwise) const {
    return FindInt(name).value_or(otherwise);
  }
  float Float(const char* name, float otherwise) const {
    return FindFloat(name).value_or(otherwise);
  }
  std::string String(const char* name, const std::string& otherwise) const {
    return FindString(name).value_or(otherwise);
  }
};

}  // namespace qmoe_plugin::ort
