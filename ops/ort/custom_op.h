// One op of ours as ONNX Runtime sees it: the OrtCustomOp objects and the kernels that they make.
//
// There is one object for each (op, device, activation type). All objects of an op share one schema
// in ONNX Runtime, so they differ in the type of input 0 and of the output only; the other inputs
// take any type and are checked by us when the kernel is made. (ONNX Runtime's "any type" leaves
// out uint2, int2 and float8e8m0.)
#pragma once

#include <cstddef>
#include <memory>
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

struct InputSpec {
  const char* name;
  bool optional;
  bool constant;  // read once, when the kernel is made; stays in host memory on every device
};

struct OpSpec {
  const char* name;
  std::span<const InputSpec> inputs;
  /// The output has the shape of input 0, but for the last dimension if this integer attribute is
  /// named.
  const char* last_dim_attribute;
  /// Whether the output may be written over input 0.
  bool in_place;
  std::unique_ptr<OpKernel> (*make_kernel)(const NodeInfo& node);
};

const OpSpec& QMoeOp();         // qmoe_op.cc
const OpSpec& MatMulNBitsOp();  // matmul_nbits_op.cc

class CustomOp : public OrtCustomOp {
 public:
  /// `version` is the API version that the runtime and we agree on.
  CustomOp(Api api, uint32_t version, const OpSpec& spec, DeviceType device, DType dtype);

  const Api& api() const { return api_; }
  const OpSpec& spec() const { return spec_; }
  DeviceType device() const { return device_; }
  DType dtype() const { return dtype_; }

 private:
  Api api_;
  const OpSpec& spec_;
  DeviceType device_;
  DType dtype_;
};

}  // namespace qmoe_plugin::ort
