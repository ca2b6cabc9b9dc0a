// Calls into ONNX Runtime: a status that it returns becomes an Error, an Error of ours becomes a
// status.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "ops/error.h"
#include "ops/ort/abi.h"

namespace qmoe_plugin::ort {

/// One runtime's function table. A process may hold several runtimes, so there is no global one:
/// every object that calls ONNX Runtime keeps the Api it was made with.
class Api {
 public:
  explicit Api(const OrtApi* table) : table_(reinterpret_cast<const void* const*>(table)) {}

  /// The function in slot S, for those that return no status:
  /// `api.Get<slot::ReleaseStatus>()(status)`.
  template <class S>
  typename S::Pointer Get() const {
    return reinterpret_cast<typename S::Pointer>(const_cast<void*>(table_[S::kIndex]));
  }

  /// Calls slot S and returns whether it succeeded; its message is dropped.
  template <class S, class... Args>
  bool Try(Args... args) const {
    OrtStatus* status = Get<S>()(args...);
    if (status) Get<slot::ReleaseStatus>()(status);
    return !status;
  }

  /// Calls slot S; throws Error with ONNX Runtime's message when it fails.
  template <class S, class... Args>
  void Call(Args... args) const {
    if (OrtStatus* status = Get<S>()(args...)) [[unlikely]]
      Throw(status);
  }

  /// The string that slot S writes in ONNX Runtime's two-step way: ask for the size, then for the
  /// characters.
  template <class S, class... Args>
  std::string String(Args... args) const {
    size_t size = 0;  // with the closing zero
    Call<S>(args..., static_cast<char*>(nullptr), &size);
    std::string text(size, '\0');
    Call<S>(args..., text.data(), &size);
    text.resize(size ? size - 1 : 0);
    return text;
  }

  OrtStatus* MakeStatus(ErrorCode code, const std::string& message) const noexcept;

 private:
  [[noreturn]] void Throw(OrtStatus* status) const;

  const void* const* table_;
};

/// Runs `body`, and turns whatever it throws into a status whose message starts with `subject`.
/// Every function that ONNX Runtime calls goes through here.
template <class Body>
OrtStatus* Guard(const Api& api, const std::string& subject, Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return nullptr;
  } catch (const Error& error) {
    return api.MakeStatus(error.code(), subject + error.what());
  } catch (const std::bad_alloc&) {
    return api.MakeStatus(ErrorCode::kRuntime, subject + "out of memory");
  } catch (const std::exception& error) {
    return api.MakeStatus(ErrorCode::kRuntime, subject + error.what());
  } catch (...) {
    return api.MakeStatus(ErrorCode::kRuntime, subject + "unknown exception");
  }
}

}  // namespace qmoe_plugin::ort
