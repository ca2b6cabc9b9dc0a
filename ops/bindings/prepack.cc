// Packing weights without a session, for qmoe_plugin.prepack.
#include "ops/bindings/prepack.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <deque>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/error.h"
#include "qmoe_plugin.h"

namespace py = pybind11;

namespace qmoe_plugin {
namespace {

using ByteArray = py::array_t<uint8_t, py::array::c_style>;
/// Type, shape and bytes.
using Tensor = std::tuple<std::string, std::vector<int64_t>, ByteArray>;

/// What the library calls back with, and what it gave.
struct Packing {
  py::dict packed;
  std::string message;
  std::exception_ptr error;  // one of Python's, raised while allocating

  /// Called without the GIL.
  static void* Allocate(void* user, const char* projection, size_t bytes) {
    Packing& packing = *static_cast<Packing*>(user);
    const py::gil_scoped_acquire gil;
    try {
      ByteArray array{py::ssize_t(bytes)};
      packing.packed[projection] = array;
      return array.mutable_data();
    } catch (...) {
      packing.error = std::current_exception();
      return nullptr;
    }
  }
  static void Fail(void* user, const char* message) {
    static_cast<Packing*>(user)->message = message;
  }
};

/// The dict's items; those of Python's types that an attribute may have.
std::vector<qmoe_plugin_attribute> Attributes(const py::dict& given,
                                              std::deque<std::string>& strings) {
  std::vector<qmoe_plugin_attribute> attributes;
  for (const auto& [name, value] : given) {
    qmoe_plugin_attribute attribute{};
    attribute.name = strings.emplace_back(name.cast<std::string>()).c_str();
    if (py::isinstance<py::int_>(value)) {
      attribute.type = 'i';
      attribute.i = value.cast<int64_t>();
    } else if (py::isinstance<py::float_>(value)) {
      attribute.type = 'f';
      attribute.f = value.cast<float>();
    } else {
      attribute.type = 's';
      attribute.s = strings.emplace_back(value.cast<std::string>()).c_str();
    }
    attributes.push_back(attribute);
  }
  return attributes;
}

std::vector<qmoe_plugin_tensor> Inputs(const std::vector<std::optional<Tensor>>& given) {
  std::vector<qmoe_plugin_tensor> inputs(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    if (!given[i]) continue;
    const auto& [dtype, shape, bytes] = *given[i];
    inputs[i] = {dtype.c_str(), shape.data(), shape.size(), bytes.data(), size_t(bytes.size())};
  }
  return inputs;
}

py::dict Prepack(const std::string& op, const std::string& dtype, int sm,
                 const py::dict& attributes, const std::vector<std::optional<Tensor>>& inputs) {
  std::deque<std::string> strings;  // a deque never moves its elements
  const std::vector<qmoe_plugin_attribute> attribute_list = Attributes(attributes, strings);
  const std::vector<qmoe_plugin_tensor> input_list = Inputs(inputs);
  const qmoe_plugin_node node{
      op.c_str(),        dtype.c_str(),    attribute_list.data(), attribute_list.size(),
      input_list.data(), input_list.size()};
  Packing packing;
  int result;
  {
    const py::gil_scoped_release release;
    result = qmoe_plugin_prepack(&node, sm, &Packing::Allocate, &Packing::Fail, &packing);
  }
  if (packing.error) std::rethrow_exception(packing.error);
  if (result < 0) FailRuntime(packing.message);
  if (result > 0) FailInvalid(packing.message);
  return packing.packed;
}

py::dict ReadPacked(const py::bytes& header, size_t size) {
  const std::string_view first = header;
  QMOE_REQUIRE(first.size() >= std::min(size, size_t(64)), "give the first 64 bytes, not ",
               first.size());
  std::string message;
  const auto fail = [](void* user, const char* text) { *static_cast<std::string*>(user) = text; };
  qmoe_plugin_packed packed;
  if (qmoe_plugin_read_packed(first.data(), size, &packed, fail, &message) != 0)
    FailInvalid(message);
  py::dict row;
  row["format"] = packed.format;
  row["layout"] = packed.layout;
  row["device"] = packed.device;
  row["scale_dtype"] = packed.scale_dtype;
  row["experts"] = packed.experts;
  row["rows"] = packed.rows;
  row["k"] = packed.k;
  row["block_size"] = packed.block_size;
  row["gated"] = packed.gated != 0;
  row["zero_points"] = packed.zero_points != 0;
  row["act_scales"] = packed.act_scales != 0;
  return row;
}

}  // namespace

void DefinePrepack(py::module_& module) {
  using py::arg;
  module.def("prepack", &Prepack, py::kw_only(), arg("op"), arg("dtype"), arg("sm"),
             arg("attributes"), arg("inputs"));
  module.def("read_packed", &ReadPacked, arg("header"), arg("size"));
}

}  // namespace qmoe_plugin
