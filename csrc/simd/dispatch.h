// The instruction sets that there are kernels for, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "simd/kernels.h"

namespace fastpeft {

// Their names, the best first, whether or not this processor runs them.
std::vector<std::string> isas();
// "auto" (the best that this processor runs) or such a name; false where it cannot run here.
bool set_isa(const std::string& name);

}  // namespace fastpeft
