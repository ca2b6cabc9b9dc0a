// The one error type. Thrown anywhere inside, turned into an OrtStatus in ops/ort/ and into a
// Python exception in ops/bindings/. A message says what was given, what is allowed and what to do;
// the caller adds the node's name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qmoe_plugin {

/// What kind of failure it is; ops/ort/ maps it to an OrtErrorCode.
enum class ErrorCode { kInvalidArgument, kNotSupported, kRuntime };

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

/// Writes all arguments one after the other into a string.
template <class... Args>
std::string Concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// The model or the caller gave something wrong.
template <class... Args>
[[noreturn]] void FailInvalid(const Args&... args) {
  throw Error(ErrorCode::kInvalidArgument, Concat(args...));
}

/// The request is legal, but nothing here implements it.
template <class... Args>
[[noreturn]] void FailUnsupported(const Args&... args) {
  throw Error(ErrorCode::kNotSupported, Concat(args...));
}

/// The machine failed us: out of memory, a CUDA error, a damaged buffer.
template <class... Args>
[[noreturn]] void FailRuntime(const Args&... args) {
  throw Error(ErrorCode::kRuntime, Concat(args...));
}

/// Fails with an invalid-argument error unless `ok`. The message is only built on failure.
#define QMOE_REQUIRE(ok, ...)                  \
  do {                                         \
    if (!(ok)) [[unlikely]]                    \
      ::qmoe_plugin::FailInvalid(__VA_ARGS__); \
  } while (false)

}  // namespace qmoe_plugin
