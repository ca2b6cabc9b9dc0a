# Pairs format headers with kernel headers. Adding a header is enough: the globs are checked at every build.
#
# QMOE_PLUGIN_EXTRA_FORMATS may name folders with further format headers, outside this tree.
set(QMOE_PLUGIN_EXTRA_FORMATS "" CACHE STRING "Folders with more format headers, one header a format")

set(QMOE_PLUGIN_FORMAT_HEADERS "")
set(format_names "")
foreach(folder IN ITEMS ${CMAKE_CURRENT_SOURCE_DIR}/ops/formats ${QMOE_PLUGIN_EXTRA_FORMATS})
  get_filename_component(folder ${folder} ABSOLUTE BASE_DIR ${CMAKE_SOURCE_DIR})
  file(GLOB headers CONFIGURE_DEPENDS ${folder}/*.h)
  list(FILTER headers EXCLUDE REGEX "/ops/formats/format\\.h$")
  if(NOT headers)
    message(FATAL_ERROR "QMOE_PLUGIN_EXTRA_FORMATS names ${folder}, in which there is no header (*.h)")
  endif()
  foreach(header IN LISTS headers)
    get_filename_component(format ${header} NAME_WE)
    if(format IN_LIST format_names)
      message(FATAL_ERROR "${header}: there is a format called ${format} already; formats have unique names")
    endif()
    list(APPEND format_names ${format})
    list(APPEND QMOE_PLUGIN_FORMAT_HEADERS ${header})
  endforeach()
endforeach()

# Writes a file only if its content changed, so that nothing is rebuilt for nothing.
function(qmoe_write path content)
  file(CONFIGURE OUTPUT ${path} CONTENT "${content}" @ONLY)
endfunction()

# One .cc a format that registers it with the host.
function(qmoe_generate_formats out)
  set(sources "")
  foreach(header IN LISTS QMOE_PLUGIN_FORMAT_HEADERS)
    get_filename_component(format ${header} NAME_WE)
    set(path ${CMAKE_CURRENT_BINARY_DIR}/generated/format_${format}.cc)
    qmoe_write(${path} "#include \"${header}\"

namespace qmoe_plugin {
namespace {
static_assert(std::string_view(formats::${format}::kName) == \"${format}\",
              \"kName must be the name of the header\");
[[maybe_unused]] const bool registered = RegisterFormat(DescribeFormat<formats::${format}>());
}  // namespace
}  // namespace qmoe_plugin
")
    list(APPEND sources ${path})
  endforeach()
  set(${out} ${sources} PARENT_SCOPE)
endfunction()

# One .cu a (kernel, format). A kernel is a header ops/gemm/gemv_*.cuh or ops/gemm/grouped_gemm_*.cuh. The generic ones, which
# compile in less time than the headers that they include, share theirs. Further arguments name formats: without any, all.
function(qmoe_generate_cuda_kernels out)
  file(GLOB kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/ops/gemm/gemv_*.cuh
       ${PROJECT_SOURCE_DIR}/ops/gemm/grouped_gemm_*.cuh)
  set(generic gemv_simt grouped_gemm_dequant)
  set(units generic)
  foreach(kernel_header IN LISTS kernels)
    get_filename_component(kernel ${kernel_header} NAME_WE)
    if(NOT kernel IN_LIST generic)
      list(APPEND units ${kernel})
    endif()
  endforeach()
  set(sources "")
  foreach(header IN LISTS QMOE_PLUGIN_FORMAT_HEADERS)
    get_filename_component(format ${header} NAME_WE)
    if(ARGN AND NOT format IN_LIST ARGN)
      continue()
    endif()
    foreach(unit IN LISTS units)
      set(members ${unit})
      if(unit STREQUAL "generic")
        set(members ${generic})
      endif()
      set(includes "")
      set(registrations "")
      foreach(kernel IN LISTS members)
        string(APPEND includes "#include \"ops/gemm/${kernel}.cuh\"\n")
        string(APPEND registrations "QMOE_REGISTER_CUDA_GEMM(${kernel}, ${format});\n")
      endforeach()
      set(path ${CMAKE_CURRENT_BINARY_DIR}/generated/${unit}.${format}.cu)
      qmoe_write(${path} "${includes}#include \"${header}\"\n\n${registrations}")
      list(APPEND sources ${path})
    endforeach()
  endforeach()
  set(${out} ${sources} PARENT_SCOPE)
endfunction()
