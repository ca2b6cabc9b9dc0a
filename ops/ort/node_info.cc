#include "ops/ort/node_info.h"

#include <cstring>

#include "ops/ort/tensors.h"

namespace qmoe_plugin::ort {
namespace {

/// The CUDA device that the node's execution provider was made for.
Device FindDevice(const Api& api, const OrtKernelInfo* info, DeviceType type) {
  if (type == DeviceType::kCpu) return Device{};
  OrtAllocator* allocator = nullptr;
  api.Call<slot::KernelInfoGetAllocator>(info, OrtMemTypeDefault, &allocator);
  int index = 0;
  const bool known = api.Try<slot::MemoryInfoGetId>(allocator->Info(allocator), &index);
  api.Get<slot::ReleaseAllocator>()(allocator);
  if (!known) FailRuntime("ONNX Runtime does not say which CUDA device the node is on");
  return CudaDevice(index);
}

}  // namespace

NodeInfo::NodeInfo(const CustomOp& op, const OrtKernelInfo* info)
    : op_(op), api_(op.api()), info_(info) {
  name_ = api_.String<slot::KernelInfo_GetNodeName>(info);
  if (name_.empty()) {
    name_ =
        "(unnamed, output " + api_.String<slot::KernelInfo_GetOutputName>(info, size_t(0)) + ")";
  }
  device_ = FindDevice(api_, info, op.device());
}

std::optional<int64_t> NodeInfo::FindInt(const char* attribute) const {
  int64_t value = 0;
  if (api_.Try<slot::KernelInfoGetAttribute_int64>(info_, attribute, &value)) return value;
  RefuseOtherType(attribute, "an integer");
  return std::nullopt;
}

std::optional<float> NodeInfo::FindFloat(const char* attribute) const {
  float value = 0;
  if (api_.Try<slot::KernelInfoGetAttribute_float>(info_, attribute, &value)) return value;
  RefuseOtherType(attribute, "a float");
  return std::nullopt;
}

std::optional<std::string> NodeInfo::FindString(const char* attribute) const {
  size_t size = 0;
  if (api_.Try<slot::KernelInfoGetAttribute_string>(info_, attribute, static_cast<char*>(nullptr),
                                                    &size))
    return api_.String<slot::KernelInfoGetAttribute_string>(info_, attribute);
  RefuseOtherType(attribute, "a string");
  return std::nullopt;
}

/// ONNX Runtime fails alike for a missing attribute and for one of another type. The second must
/// not pass for the default, so look whether the attribute can be read as anything.
void NodeInfo::RefuseOtherType(const char* attribute, const char* wanted) const {
  int64_t integer = 0;
  float real = 0;
  size_t size = 0;
  const char* given = nullptr;
  if (api_.Try<slot::KernelInfoGetAttribute_int64>(info_, attribute, &integer)) {
    given = "an integer";
  } else if (api_.Try<slot::KernelInfoGetAttribute_float>(info_, attribute, &real)) {
    given = "a float";
  } else if (api_.Try<slot::KernelInfoGetAttribute_string>(info_, attribute,
                                                           static_cast<char*>(nullptr), &size)) {
    given = "a string";
  } else if (api_.Try<slot::KernelInfoGetAttributeArray_int64>(
                 info_, attribute, static_cast<int64_t*>(nullptr), &(size = 0))) {
    given = "a list of integers";
  } else if (api_.Try<slot::KernelInfoGetAttributeArray_float>(
                 info_, attribute, static_cast<float*>(nullptr), &(size = 0))) {
    given = "a list of floats";
  }
  if (given) FailInvalid("attribute ", attribute, " is ", given, ", but must be ", wanted);
}

bool NodeInfo::HasInput(size_t index) const {
  size_t count = 0;
  api_.Call<slot::KernelInfo_GetInputCount>(info_, &count);
  // An input left out in the middle is there, with an empty name.
  return index < count && !api_.String<slot::KernelInfo_GetInputName>(info_, index).empty();
}

std::vector<TensorView> NodeInfo::ConstantInputs() const {
  const OpSpec& spec = op_.spec();
  std::vector<TensorView> tensors(spec.inputs.size());
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    if (!spec.inputs[i].constant) continue;
    if (HasInput(i)) {
      tensors[i] = ConstantInput(i);
    } else if (!spec.inputs[i].optional) {
      FailInvalid("input ", i, " (", spec.inputs[i].name, ") is required, but was left out");
    }
  }
  return tensors;
}

TensorView NodeInfo::ConstantInput(size_t index) const {
  const std::string input = Concat("input ", index, " (", op_.spec().inputs[index].name, ")");
  int is_constant = 0, is_tensor = 0;
  const OrtValue* value = nullptr;  // belongs to the session
  api_.Call<slot::KernelInfoGetConstantInput_tensor>(info_, index, &is_constant, &value);
  if (!is_constant || !value) {
    FailInvalid(input,
                " is not constant. Weights are packed once, when the session is made: store it as "
                "an initializer that is no graph input, or compute it before export");
  }
  api_.Call<slot::IsTensor>(value, &is_tensor);
  QMOE_REQUIRE(is_tensor, input, " is not a dense tensor; store it as one");

  const OrtMemoryInfo* memory = nullptr;
  OrtMemoryInfoDeviceType device = OrtMemoryInfoDeviceType_CPU;
  api_.Call<slot::GetTensorMemoryInfo>(value, &memory);
  api_.Get<slot::MemoryInfoGetDeviceType>()(memory, &device);
  QMOE_REQUIRE(device == OrtMemoryInfoDeviceType_CPU, input,
               " was put into device memory, which happens when the same initializer also feeds an "
               "activation input of this node; give each input its own initializer");

  TensorView view = DescribeTensor(api_, value);
  CheckType(view, input);
  size_t bytes = 0;
  api_.Call<slot::GetTensorSizeInBytes>(value, &bytes);
  CheckSize(view, bytes, input);
  api_.Call<slot::GetTensorData>(value, &view.data);
  QMOE_REQUIRE(view.data || bytes == 0, input, " has no data");
  return view;
}

void NodeInfo::Log(OrtLoggingLevel severity, const std::string& message) const {
  const OrtLogger* logger = nullptr;
  OrtLoggingLevel lowest = ORT_LOGGING_LEVEL_WARNING;
  api_.Call<slot::KernelInfo_GetLogger>(info_, &logger);
  api_.Call<slot::Logger_GetLoggingSeverityLevel>(logger, &lowest);
  if (severity < lowest) return;
  const std::string line = Concat(op_.spec().name, " '", name_, "': ", message);
  api_.Call<slot::Logger_LogMessage>(logger, severity, line.c_str(), "qmoe_plugin", 0,
                                     "MakeKernel");
}

void NodeInfo::LogPacked(std::span<const PackedHeader> weights, bool before) const {
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start_;
  std::string text = Concat(Name(dtype()), " on ", device_.Describe(),
                            before ? ", loaded packed in " : ", packed in ", time.count(), " ms");
  for (const PackedHeader& w : weights) {
    text += Concat("; ", std::string(w.format, strnlen(w.format, sizeof w.format)),
                   w.block_size ? Concat(" block ", w.block_size) : " per channel", " ", w.experts,
                   " x ", w.rows, " x ", w.k, " as ", Name(w.layout), ", ", w.bytes, " bytes");
  }
  Log(ORT_LOGGING_LEVEL_INFO, text);
}

}  // namespace qmoe_plugin::ort
