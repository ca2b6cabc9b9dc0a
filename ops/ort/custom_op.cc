#include "ops/ort/custom_op.h"

#include <limits>
#include <string_view>

#include "ops/domain.h"
#include "ops/ort/infer_shape.h"
#include "ops/ort/node_info.h"
#include "ops/ort/run_context.h"

namespace qmoe_plugin::ort {
namespace {

const CustomOp& Self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

/// What ONNX Runtime holds for a node: the kernel, and what is needed to report its failures.
struct KernelHandle {
  Api api;
  std::string subject;  // "qmoe_plugin.QMoE node '/layers.0/moe': "
  std::unique_ptr<OpKernel> kernel;
  std::unique_ptr<RunMemory> memory;
};

OrtStatus* MakeKernel(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** out) {
  const CustomOp& self = Self(op);
  const std::string op_name = Concat(self.domain(), ".", self.spec().name);
  std::string subject = op_name + ": ";
  return Guard(self.api(), subject, [&] {
    const NodeInfo node(self, info);
    // The name goes into `subject`, so that a failure below carries it.
    subject =
        Concat(op_name, " node '", node.name(), "'",
               std::string_view(self.domain()) == kDomain ? "" : " (run by qmoe_plugin)", ": ");
    auto handle =
        std::make_unique<KernelHandle>(KernelHandle{self.api(), subject, nullptr, nullptr});
    handle->memory = std::make_unique<RunMemory>(self.api(), node.device());
    handle->kernel = self.spec().make_kernel(node);
    *out = handle.release();
  });
}

OrtStatus* Compute(void* kernel, OrtKernelContext* context) {
  const KernelHandle& handle = *static_cast<const KernelHandle*>(kernel);
  return Guard(handle.api, handle.subject,
               [&] { handle.kernel->Run(RunContext(handle.api, *handle.memory, context)); });
}

void Destroy(void* kernel) { delete static_cast<KernelHandle*>(kernel); }

/// What to declare for an element type. Releases before 1.31 take a declared type for one of ONNX's
/// numbering (TensorProto.DataType), which differs from their own for float8e8m0 only.
ONNXTensorElementDataType Declared(DType dtype, uint32_t version) {
  constexpr int kOnnxFloat8E8M0 = 24;
  const bool by_onnx = dtype == DType::kFloat8E8M0 && version < 31;
  return ONNXTensorElementDataType(by_onnx ? kOnnxFloat8E8M0 : int(dtype));
}

ONNXTensorElementDataType InputType(const OrtCustomOp* op, size_t index) {
  const CustomOp& self = Self(op);
  if (index == 0) return Declared(self.dtype(), op->version);
  const ScaleSet set = self.spec().inputs[index].scale;
  return set == ScaleSet::kNone ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
                                : Declared(self.scales(set), op->version);
}

ONNXTensorElementDataType OutputType(const OrtCustomOp* op, size_t) {
  return ONNXTensorElementDataType(Self(op).dtype());
}

OrtCustomOpInputOutputCharacteristic InputCharacteristic(const OrtCustomOp* op, size_t index) {
  return Self(op).spec().inputs[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

OrtMemType InputMemory(const OrtCustomOp* op, size_t index) {
  const CustomOp& self = Self(op);
  const bool host = self.device() == DeviceType::kCuda && self.spec().inputs[index].constant;
  return host ? OrtMemTypeCPUInput : OrtMemTypeDefault;
}

OrtStatus* InferShape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  // ONNX Runtime drops the status and keeps its memory, so none is ever returned.
  const CustomOp& self = Self(op);
  try {
    const OpSpec& spec = self.spec();
    InferOutputShape(self.api(), spec.last_dim_attribute, spec.last_dim_input, context);
  } catch (...) {  // the shape stays unknown, and the kernel will name what is wrong
  }
  return nullptr;
}

size_t MayInplace(int** input_index, int** output_index) {
  static int zero = 0;
  *input_index = *output_index = &zero;
  return 1;
}

}  // namespace

CustomOp::CustomOp(Api api, uint32_t version, const char* domain, const OpSpec& spec,
                   DeviceType device, DType dtype, std::array<DType, 2> scales)
    : OrtCustomOp{},
      api_(api),
      domain_(domain),
      spec_(spec),
      device_(device),
      dtype_(dtype),
      scales_(scales) {
  this->version = version;
  GetName = [](const OrtCustomOp* op) { return Self(op).spec().name; };
  GetExecutionProviderType = [](const OrtCustomOp* op) {
    return Self(op).device() == DeviceType::kCuda ? "CUDAExecutionProvider"
                                                  : "CPUExecutionProvider";
  };
  GetInputType = InputType;
  GetInputTypeCount = [](const OrtCustomOp* op) { return Self(op).spec().inputs.size(); };
  GetOutputType = OutputType;
  GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  GetInputCharacteristic = InputCharacteristic;
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetInputMemoryType = InputMemory;
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = Compute;
  KernelDestroy = Destroy;
  InferOutputShapeFn = InferShape;
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
  if (spec.in_place) {
    GetMayInplace = MayInplace;
    ReleaseMayInplace = [](int*, int*) {};
  }
}

}  // namespace qmoe_plugin::ort
