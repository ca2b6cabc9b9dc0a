// Parallel work outside a session's run: packing at load, quantising. Runs use the session's own
// pool instead.
#pragma once

#include <cstdint>
#include <functional>

namespace qmoe_plugin {

/// Runs `body` once on each core and returns when all are done; rethrows the first exception. A
/// body shares out the work itself, for instance by an atomic counter, and may keep scratch memory
/// of its own.
void OnAllCores(const std::function<void()>& body);

/// Number of workers that OnAllCores starts.
unsigned CoreCount();

/// body(i) for i in [0, count) on all cores, in runs of neighbours; rethrows the first exception.
void ForEachOnAllCores(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace qmoe_plugin
