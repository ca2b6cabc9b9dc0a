#include "ops/bindings/rounding.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ops/error.h"
#include "ops/rounding.h"

namespace py = pybind11;

namespace qmoe_plugin {
namespace {

using FloatArray = py::array_t<float, py::array::c_style>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

/// The codes of these values. The last ones are kept: a matrix is rounded in many calls.
std::shared_ptr<const Codes> CodesOf(const std::vector<double>& values) {
  static std::mutex mutex;
  static std::shared_ptr<const Codes> last;
  const std::lock_guard lock(mutex);
  if (!last || last->values() != values) last = std::make_shared<const Codes>(values);
  return last;
}

void RequireShape(const py::array& array, int64_t rows, int64_t columns, const char* name) {
  QMOE_REQUIRE(array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns, name,
               " must be [", rows, ", ", columns, "]");
}

/// The arguments that both functions share.
struct Arguments {
  Arguments(const FloatArray& weights, const std::vector<double>& values, const FloatArray& scales,
            const py::object& zeros, float default_zero, int64_t height, int64_t width)
      : codes(CodesOf(values)) {
    QMOE_REQUIRE(weights.ndim() == 2 && weights.shape(1) > 0,
                 "weights must be a matrix with one column at least");
    QMOE_REQUIRE(height > 0 && width > 0, "blocks are ", height, " x ", width,
                 "; both must be positive");
    shape = {weights.shape(0), weights.shape(1), height, width};
    RequireShape(scales, shape.block_rows(), shape.block_columns(), "scales");
    block_scales = {scales.data(), nullptr, default_zero};
    if (!zeros.is_none()) {
      QMOE_REQUIRE(codes->is_integer(), "only integers have zero points");
      kept_zeros = zeros.cast<FloatArray>();
      RequireShape(kept_zeros, shape.block_rows(), shape.block_columns(), "zeros");
      block_scales.zeros = kept_zeros.data();
    }
  }

  std::shared_ptr<const Codes> codes;
  BlockShape shape;
  FloatArray kept_zeros;
  BlockScales block_scales;
};

ByteArray PyRound(const FloatArray& weights, const std::vector<double>& values,
                  const FloatArray& scales, const py::object& zeros, float default_zero,
                  int64_t height, int64_t width) {
  const Arguments given(weights, values, scales, zeros, default_zero, height, width);
  ByteArray packed({given.shape.rows, (given.shape.k * given.codes->bits() + 7) / 8});
  const float* source = weights.data();
  uint8_t* target = packed.mutable_data();
  const py::gil_scoped_release release;
  RoundToCodes(*given.codes, given.shape, given.block_scales, source, target);
  return packed;
}

FloatArray PyErrors(const FloatArray& weights, const std::vector<double>& values,
                    const FloatArray& scales, const py::object& zeros, float default_zero,
                    int64_t height, int64_t width, const py::object& importance) {
  const Arguments given(weights, values, scales, zeros, default_zero, height, width);
  FloatArray factors;
  if (!importance.is_none()) {
    factors = importance.cast<FloatArray>();
    QMOE_REQUIRE(factors.ndim() == 1 && factors.shape(0) == given.shape.k, "importance must be [",
                 given.shape.k, "]");
  }
  FloatArray errors({given.shape.block_rows(), given.shape.block_columns()});
  const float *source = weights.data(), *factor = importance.is_none() ? nullptr : factors.data();
  float* target = errors.mutable_data();
  const py::gil_scoped_release release;
  RoundingErrors(*given.codes, given.shape, given.block_scales, source, factor, target);
  return errors;
}

}  // namespace

void DefineRounding(py::module_& module) {
  using py::arg;
  module.def("round_to_codes", &PyRound, arg("weights"), arg("values"), arg("scales"), arg("zeros"),
             arg("default_zero"), arg("height"), arg("width"));
  module.def("rounding_errors", &PyErrors, arg("weights"), arg("values"), arg("scales"),
             arg("zeros"), arg("default_zero"), arg("height"), arg("width"), arg("importance"));
}

}  // namespace qmoe_plugin
