#include "ops/formats/format.h"

#include <algorithm>
#include <deque>
#include <string>

#include "ops/error.h"

namespace qmoe_plugin {
namespace {

struct Registry {
  std::deque<Format> storage;  // a deque never moves its elements
  std::vector<const Format*> sorted;
};

Registry& GetRegistry() {
  static Registry registry;
  return registry;
}

}  // namespace

const std::vector<const Format*>& Formats() { return GetRegistry().sorted; }

const Format* FindFormat(std::string_view name) {
  for (const Format* format : Formats())
    if (name == format->name) return format;
  return nullptr;
}

const Format& GetFormat(std::string_view name) {
  if (const Format* format = FindFormat(name)) return *format;
  std::string known;
  for (const Format* format : Formats())
    known += std::string(known.empty() ? "" : ", ") + format->name;
  FailUnsupported("unknown weight format '", name, "'; this build knows ", known);
}

bool RegisterFormat(Format format) {
  if (FindFormat(format.name) != nullptr) return true;  // a kernel's translation unit came first
  Registry& registry = GetRegistry();
  const Format* added = &registry.storage.emplace_back(format);
  const auto by_name = [](const Format* a, const Format* b) {
    return std::string_view(a->name) < std::string_view(b->name);
  };
  registry.sorted.insert(
      std::upper_bound(registry.sorted.begin(), registry.sorted.end(), added, by_name), added);
  return true;
}

}  // namespace qmoe_plugin
