// One op of ours as ONNX Runtime sees it: the OrtCustomOp objects and the kernels that they make.
//
// There is one object for each (op, device, activation type). All objects of an op share one schema
// in ONNX Runtime, so they differ in the type of input 0 and of the output only; the other inputs
// take any type and are checked by us when the kernel is made.
//
// ONNX Runtime's "any type" leaves out uint2, int2 and float8e8m0, and holds for an input as soon
// as one object says so. Scales that may be float8e8m0 are therefore declared in each of their
// types, by one object for each. fc1 and fc3 have scales of one type, fc2 may have others (its
// format may be another one): one object for each pair.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "ops/device.h"
#include "ops/dtype.h"
#include "ops/ort/api.h"

namespace qmoe_plugin::ort {

class NodeInfo;
class RunContext;

/// What a node computes. Shared by concurrent runs, hence const.
class OpKernel {
 public:
  virtual ~OpKernel() = default;
  virtual void Run(const RunContext& context) const = 0;
};

/// Inputs whose scales have the same type in a node.
enum class ScaleSet { kNone, kFirst, kSecond };

struct InputSpec {
  const char* name;
  bool optional;
  bool constant;  // read once, when the kernel is made; stays in host memory on every device
  ScaleSet scale = ScaleSet::kNone;  // of one of the types in kScaleTypes
};

/// The types that scales may have, float8e8m0 as bytes among them.
inline constexpr DType kScaleTypes[] = {DType::kFloat32, DType::kFloat16,    DType::kBFloat16,
                                        DType::kUint8,   DType::kFloat8E4M3, DType::kFloat8E8M0};

struct OpSpec {
  const char* name;
  std::span<const InputSpec> inputs;
  /// The output has the shape of input 0, but for the last dimension if this integer attribute is
  /// named, or, where a node lacks it, an input whose first dimension it is.
  const char* last_dim_attribute;
  std::optional<size_t> last_dim_input = std::nullopt;
  /// Whether the output may be written over input 0.
  bool in_place;
  std::unique_ptr<OpKernel> (*make_kernel)(const NodeInfo& node);
};

const OpSpec& QMoeOp();         // qmoe_op.cc
const OpSpec& MoEOp();          // likewise
const OpSpec& MatMulNBitsOp();  // matmul_nbits_op.cc
const OpSpec& Fp8WeightOp();    // likewise
const OpSpec& Fp4WeightOp();    // likewise

class CustomOp : public OrtCustomOp {
 public:
  /// `version` is the API version that the runtime and we agree on; `domain` the one that the
  /// object is added to; `scales` the types of the first and the second set of scales.
  CustomOp(Api api, uint32_t version, const char* domain, const OpSpec& spec, DeviceType device,
           DType dtype, std::array<DType, 2> scales);

  const Api& api() const { return api_; }
  const char* domain() const { return domain_; }
  const OpSpec& spec() const { return spec_; }
  DeviceType device() const { return device_; }
  DType dtype() const { return dtype_; }
  /// Type of the scales of a set; not for kNone.
  DType scales(ScaleSet set) const { return scales_[set == ScaleSet::kSecond]; }

 private:
  Api api_;
  const char* domain_;
  const OpSpec& spec_;
  DeviceType device_;
  DType dtype_;
  std::array<DType, 2> scales_;
};

}  // namespace qmoe_plugin::ort
