#include "ops/tuning.h"

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "ops/error.h"

namespace qmoe_plugin {
namespace {

constexpr char kFirstLine[] = "qmoe_plugin tuning 1";

/// FNV-1a of the version, and of what selection knows of each CUDA kernel.
std::string KernelDigest() {
  std::ostringstream text;
  text << QMOE_PLUGIN_VERSION;
  for (const Kernel* kernel : Kernels())
    if (kernel->device == DeviceType::kCuda)
      text << '\n' << kernel->name << ' ' << kernel->priority << ' ' << kernel->limits;
  uint64_t hash = 14695981039346656037u;
  for (const char c : text.str()) hash = (hash ^ uint8_t(c)) * 1099511628211u;
  std::ostringstream digits;
  digits << std::hex << hash;
  return digits.str();
}

std::string DeviceLine(const Device& device, const std::string& name) {
  return Concat("device sm_", device.sm, " ", name);
}

/// The file that QMOE_PLUGIN_TUNING names, line by line.
class Reader {
 public:
  explicit Reader(const char* path) : path_(path), file_(path) {
    if (!file_) Fail("cannot be read");
  }

  bool Next(std::string* line) {
    ++number_;
    return bool(std::getline(file_, *line));
  }

  [[noreturn]] void FailLine(const std::string& what) const {
    Fail(Concat("line ", number_, ": ", what));
  }

  [[noreturn]] void Fail(const std::string& what) const {
    FailInvalid("the tuning file ", path_, " (QMOE_PLUGIN_TUNING): ", what,
                ". Make it anew with `python -m qmoe_plugin tune`, or unset the variable");
  }

 private:
  std::string path_;
  std::ifstream file_;
  int number_ = 0;
};

/// What a line says of its problem, as it is written.
std::string ProblemText(const GemmProblem& p) {
  return Concat(Name(p.stage), " ", p.format->name, " ", Name(p.dtype), " experts ", p.experts,
                " topk ", p.topk, " n ", p.n, " k ", p.k, " block_size ", p.block_size,
                " zero_points ", int(p.zero_points));
}

/// " rows FIRST LAST kernel STEM", which ends a line.
struct LineEnd {
  int64_t first, last;
  std::string stem;
};

LineEnd ParseEnd(const Reader& reader, const std::string& line, size_t begin) {
  LineEnd end{};
  std::string rows, kernel, more;
  std::istringstream in(begin == std::string::npos ? "" : line.substr(begin));
  in >> rows >> end.first >> end.last >> kernel >> end.stem;
  if (!in || rows != "rows" || kernel != "kernel" || end.first < 1 || end.last < end.first ||
      in >> more)
    reader.FailLine(Concat("'", line, "' does not end with 'rows FIRST LAST kernel NAME'"));
  return end;
}

const Kernel& KernelNamed(const Reader& reader, const std::string& stem, const Format& format) {
  for (const Kernel* kernel : Kernels())
    if (kernel->device == DeviceType::kCuda && kernel->stem == stem && kernel->format == &format)
      return *kernel;
  reader.FailLine(Concat("there is no CUDA kernel ", stem, " for format ", format.name));
}

/// `device_name` null = any.
std::vector<TunedRows> Read(const Device& device, const std::string* device_name,
                            const GemmProblem& problem) {
  const char* path = std::getenv("QMOE_PLUGIN_TUNING");
  if (path == nullptr || *path == '\0' || device.type != DeviceType::kCuda) return {};
  Reader reader(path);
  std::string line;
  if (!reader.Next(&line) || line != kFirstLine)
    reader.FailLine(Concat("it is '", line.substr(0, 80), "', not '", kFirstLine, "'"));
  const std::string wanted = DeviceLine(device, device_name != nullptr ? *device_name : "");
  const bool is_for_it =
      reader.Next(&line) && (device_name != nullptr ? line == wanted : line.starts_with(wanted));
  if (!is_for_it && device_name == nullptr) return {};
  if (!is_for_it) reader.FailLine(Concat("it is '", line, "', and this is '", wanted, "'"));
  if (!reader.Next(&line) || line != "kernels " + KernelDigest())
    reader.FailLine("another build of qmoe_plugin made it, with other kernels");
  const std::string wanted_problem = ProblemText(problem);
  std::vector<TunedRows> found;
  while (reader.Next(&line)) {
    if (line.empty() || line[0] == '#') continue;
    const size_t begin = line.find(" rows ");
    const LineEnd end = ParseEnd(reader, line, begin);
    if (line.substr(0, begin) == wanted_problem)
      found.push_back({end.first, end.last, &KernelNamed(reader, end.stem, *problem.format)});
  }
  return found;
}

}  // namespace

std::string TuningHeader(const Device& device, const std::string& device_name) {
  return Concat(kFirstLine, "\n", DeviceLine(device, device_name), "\nkernels ", KernelDigest(),
                "\n");
}

std::vector<TunedRows> Tuned(const Device& device, const std::string& device_name,
                             const GemmProblem& problem) {
  return Read(device, &device_name, problem);
}

std::vector<TunedRows> Tuned(const Device& device, const GemmProblem& problem) {
  return Read(device, nullptr, problem);
}

}  // namespace qmoe_plugin
