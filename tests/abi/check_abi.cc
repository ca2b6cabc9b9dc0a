// Compares ops/ort/abi.h with ONNX Runtime's own header: compiles if both say the same.
//
// tests/test_abi.py writes abi_lists.inc from the text of abi.h: what is declared there, in lists
// of macro calls.
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <type_traits>

#include "ops/ort/abi.h"

namespace {

namespace ours = qmoe_plugin::ort;

/// Real<T> is our type T with each of our names replaced by the header's; `noexcept` does not
/// count.
template <class T>
struct RealType {
  using type = T;
};
template <class T>
using Real = typename RealType<T>::type;
template <class T>
struct RealType<const T> {
  using type = const Real<T>;
};
template <class T>
struct RealType<T*> {
  using type = Real<T>*;
};
template <class R, class... Args>
struct RealType<R(Args...)> {
  using type = Real<R>(Real<Args>...);
};
template <class R, class... Args>
struct RealType<R(Args...) noexcept> {
  using type = Real<R>(Real<Args>...);
};

#define TYPE(name)              \
  template <>                   \
  struct RealType<ours::name> { \
    using type = ::name;        \
  };
#define CONSTANT(name)
#define MEMBER(type, name)
#define SLOT(name)
#include "abi_lists.inc"
#undef TYPE
#undef CONSTANT
#undef MEMBER
#undef SLOT

template <class Ours, class Theirs>
constexpr bool SameSizeIfEnum() {
  if constexpr (std::is_enum_v<Ours>) return sizeof(Ours) == sizeof(Theirs);
  return std::is_enum_v<Ours> == std::is_enum_v<Theirs>;
}

#define TYPE(name) \
  static_assert(SameSizeIfEnum<ours::name, ::name>(), #name " is another kind of type");
#define CONSTANT(name)                                                    \
  static_assert(static_cast<int>(ours::name) == static_cast<int>(::name), \
                #name " has another value");
#define MEMBER(type, name)                                                                      \
  static_assert(offsetof(ours::type, name) == offsetof(::type, name),                           \
                #type "." #name " lies elsewhere");                                             \
  static_assert(std::is_same_v<Real<decltype(ours::type::name)>, Real<decltype(::type::name)>>, \
                #type "." #name " has another type");
#define SLOT(name)                                                                               \
  static_assert(ours::slot::name::kIndex * sizeof(void*) == offsetof(::OrtApi, name),            \
                #name " is in another slot");                                                    \
  static_assert(std::is_same_v<Real<ours::slot::name::Pointer>, Real<decltype(::OrtApi::name)>>, \
                #name " has another signature");
#include "abi_lists.inc"

static_assert(sizeof(ours::OrtCustomOp) == sizeof(::OrtCustomOp));
static_assert(sizeof(ours::OrtApiBase) == sizeof(::OrtApiBase));

}  // namespace

int main() {}
