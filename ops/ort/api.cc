#include "ops/ort/api.h"

namespace qmoe_plugin::ort {

OrtStatus* Api::MakeStatus(ErrorCode code, const std::string& message) const noexcept {
  OrtErrorCode ort_code = ORT_RUNTIME_EXCEPTION;
  if (code == ErrorCode::kInvalidArgument) ort_code = ORT_INVALID_ARGUMENT;
  if (code == ErrorCode::kNotSupported) ort_code = ORT_NOT_IMPLEMENTED;
  return Get<slot::CreateStatus>()(ort_code, message.c_str());
}

void Api::Throw(OrtStatus* status) const {
  const std::string message = Get<slot::GetErrorMessage>()(status);
  Get<slot::ReleaseStatus>()(status);
  FailRuntime("ONNX Runtime: ", message);
}

}  // namespace qmoe_plugin::ort
