// The Python module qmoe_plugin._native: quantising and packing on the host, and the library's kernel
// table.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "ops/bindings/prepack.h"
#include "ops/bindings/rounding.h"
#include "ops/error.h"
#include "ops/formats/format.h"
#include "ops/quantize.h"
#include "qmoe_plugin.h"

namespace py = pybind11;
using namespace qmoe_plugin;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

template <class Array>
void RequireMatrix(const Array& array, const char* name) {
  QMOE_REQUIRE(array.ndim() == 2, name, " must be a matrix, given ", array.ndim(), " dimensions");
}

void RequireBits(int bits) {
  QMOE_REQUIRE(bits == 1 || bits == 2 || bits == 4 || bits == 8, "bits is ", bits,
               "; a byte holds whole codes of 1, 2, 4 or 8 bits");
}

QuantShape ShapeFor(int64_t rows, int64_t k, int64_t block_size) {
  QMOE_REQUIRE(k > 0, "rows must have at least one column");
  QMOE_REQUIRE(block_size >= 0, "block_size is ", block_size,
               "; it must be 0 (one scale a row) or positive");
  return {rows, k, block_size};
}

py::tuple PyQuantize(const FloatArray& weights, const std::string& format_name, int64_t block_size,
                     bool symmetric) {
  RequireMatrix(weights, "weights");
  const Format& format = GetFormat(format_name);
  const QuantShape shape = ShapeFor(weights.shape(0), weights.shape(1), block_size);
  ByteArray codes({shape.rows, (shape.k * format.bits + 7) / 8}),
      zero_points({shape.rows, shape.groups()});
  FloatArray scales({shape.rows, shape.groups()});
  const float* source = weights.data();
  uint8_t *code_bytes = codes.mutable_data(), *zero_bytes = zero_points.mutable_data();
  float* scale_values = scales.mutable_data();
  {
    const py::gil_scoped_release release;
    Quantize(format, shape, symmetric, source, code_bytes, scale_values, zero_bytes);
  }
  return py::make_tuple(codes, scales, zero_points);
}

FloatArray PyDequantize(const ByteArray& codes, const FloatArray& scales,
                        const py::object& zero_points, const std::string& format_name, int64_t k,
                        int64_t block_size) {
  RequireMatrix(codes, "codes");
  RequireMatrix(scales, "scales");
  const Format& format = GetFormat(format_name);
  const QuantShape shape = ShapeFor(codes.shape(0), k, block_size);
  QMOE_REQUIRE(codes.shape(1) * 8 >= k * format.bits, "codes have ", codes.shape(1),
               " bytes a row; ", k, " codes of ", format.bits, " bits need ",
               (k * format.bits + 7) / 8);
  const auto require_scale_shape = [&](const FloatArray& array, const char* name) {
    QMOE_REQUIRE(
        array.ndim() == 2 && array.shape(0) == shape.rows && array.shape(1) == shape.groups(), name,
        " must be [", shape.rows, ", ", shape.groups(), "]");
  };
  require_scale_shape(scales, "scales");
  FloatArray zeros, weights({shape.rows, k});
  if (!zero_points.is_none()) {
    zeros = zero_points.cast<FloatArray>();
    require_scale_shape(zeros, "zero_points");
  }
  const float* zero_values = zero_points.is_none() ? nullptr : zeros.data();
  float* out = weights.mutable_data();
  {
    const py::gil_scoped_release release;
    Dequantize(format, shape, codes.data(), codes.shape(1), scales.data(), zero_values, out);
  }
  return weights;
}

ByteArray PyPack(const ByteArray& codes, int bits) {
  RequireMatrix(codes, "codes");
  RequireBits(bits);
  const int64_t rows = codes.shape(0), k = codes.shape(1);
  const uint8_t* source = codes.data();
  for (int64_t i = 0; i < rows * k; ++i)
    QMOE_REQUIRE(source[i] < (1 << bits), "code ", int(source[i]), " does not fit in ", bits,
                 " bits");
  ByteArray packed({rows, (k * bits + 7) / 8});
  PackCodes(bits, rows, k, source, packed.mutable_data());
  return packed;
}

ByteArray PyUnpack(const ByteArray& packed, int bits, int64_t k) {
  RequireMatrix(packed, "packed");
  RequireBits(bits);
  QMOE_REQUIRE(k >= 0 && packed.shape(1) * 8 >= k * bits, k, " codes of ", bits, " bits need ",
               (k * bits + 7) / 8, " bytes a row, given ", packed.shape(1));
  ByteArray codes({int64_t(packed.shape(0)), k});
  UnpackCodes(bits, packed.shape(0), k, packed.data(), packed.shape(1), codes.mutable_data());
  return codes;
}

const char* ScaleName(ScaleKind kind) {
  switch (kind) {
    case ScaleKind::kFloat:
      return "float";
    case ScaleKind::kE8M0:
      return "float8e8m0";
    case ScaleKind::kE4M3:
      return "float8e4m3fn";
    case ScaleKind::kAny:
      break;
  }
  return "any";
}

py::list PyFormats() {
  py::list formats;
  for (const Format* format : Formats()) {
    std::vector<double> values;
    for (int code = 0; !format->plain() && code < (1 << format->bits); ++code)
      values.push_back(double(format->centered[code]) + double(format->default_zero_point));
    py::dict row;
    row["name"] = format->name;
    row["bits"] = format->bits;
    row["default_zero_point"] = format->default_zero_point;
    row["zero_points"] = format->zero_points;
    row["values"] = values;  // none of plain formats
    row["scales"] = ScaleName(format->scales);
    row["block_size"] = format->block_size;
    row["square_blocks"] = format->square_blocks;
    row["codebook"] = format->codebook;
    formats.append(row);
  }
  return formats;
}

py::list PyKernels() {
  py::list kernels;
  for (size_t i = 0; i < qmoe_plugin_kernel_count(); ++i) {
    qmoe_plugin_kernel kernel;
    if (qmoe_plugin_get_kernel(i, &kernel) != 0)
      FailRuntime("the library's kernel table ends early");
    py::dict row;
    row["name"] = kernel.name;
    row["format"] = kernel.format;
    row["device"] = kernel.device;
    row["min_sm"] = kernel.min_sm;
    row["max_sm"] = kernel.max_sm;
    row["dtypes"] = kernel.dtypes;
    row["limits"] = kernel.limits;
    row["priority"] = kernel.priority;
    row["available"] = kernel.available != 0;
    kernels.append(row);
  }
  return kernels;
}

using Verdicts = std::vector<std::pair<std::string, std::string>>;

Verdicts PyExplain(const std::string& device, int sm, const std::string& stage,
                   const std::string& format, const std::string& dtype,
                   const std::string& activation, int64_t experts, int64_t rows, int64_t topk,
                   int64_t n, int64_t k, int64_t block_size, bool zero_points, int accuracy_level) {
  const qmoe_plugin_gemm_problem problem{device.c_str(),
                                         sm,
                                         stage.c_str(),
                                         format.c_str(),
                                         dtype.c_str(),
                                         activation.c_str(),
                                         experts,
                                         rows,
                                         topk,
                                         n,
                                         k,
                                         block_size,
                                         zero_points,
                                         accuracy_level};
  Verdicts verdicts;
  const auto visit = [](void* user, const char* kernel, const char* refusal) {
    static_cast<Verdicts*>(user)->emplace_back(kernel, refusal);
  };
  if (qmoe_plugin_explain(&problem, visit, &verdicts) != 0)
    FailInvalid(verdicts.empty() ? "the problem cannot be explained" : verdicts.front().second);
  return verdicts;
}

std::vector<int> PyCudaDevices() {
  std::vector<int> sms;
  for (int device = 0; device < qmoe_plugin_cuda_device_count(); ++device)
    sms.push_back(qmoe_plugin_cuda_device_sm(device));
  return sms;
}

std::pair<uint32_t, uint32_t> PyOrtApiRange() {
  uint32_t lowest = 0, highest = 0;
  qmoe_plugin_ort_api_range(&lowest, &highest);
  return {lowest, highest};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled part of qmoe_plugin; use the public functions of the package instead.";
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const Error& error) {
      PyErr_SetString(error.code() == ErrorCode::kRuntime ? PyExc_RuntimeError : PyExc_ValueError,
                      error.what());
    }
  });
  using py::arg;
  module.def("version", [] { return std::string(qmoe_plugin_version()); });
  module.def("ort_api_range", &PyOrtApiRange);
  module.def("has_cuda", [] { return qmoe_plugin_has_cuda() != 0; });
  module.def("cuda_archs", [] { return std::string(qmoe_plugin_cuda_archs()); });
  module.def("cuda_devices", &PyCudaDevices);
  module.def("tuning_header",
             [](int device) { return std::string(qmoe_plugin_tuning_header(device)); });
  module.def("formats", &PyFormats);
  module.def("kernels", &PyKernels);
  module.def("explain", &PyExplain, py::kw_only(), arg("device"), arg("sm"), arg("stage"),
             arg("format"), arg("dtype"), arg("activation"), arg("experts"), arg("rows"),
             arg("topk"), arg("n"), arg("k"), arg("block_size"), arg("zero_points"),
             arg("accuracy_level"));
  module.def("quantize", &PyQuantize, arg("weights"), arg("format"), arg("block_size"),
             arg("symmetric"));
  module.def("dequantize", &PyDequantize, arg("codes"), arg("scales"), arg("zero_points"),
             arg("format"), arg("k"), arg("block_size"));
  module.def("pack", &PyPack, arg("codes"), arg("bits"));
  module.def("unpack", &PyUnpack, arg("packed"), arg("bits"), arg("k"));
  DefinePrepack(module);
  DefineRounding(module);
}
