// Every kernel is compiled once per instruction set, in the namespace reinforce_ada::{baseline,avx2,avx512} that RA_ISA names in
// that build; the build that runs is chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace reinforce_ada {

enum class Isa : int { baseline, avx2, avx512 };

// Declares one kernel in the namespace of each build.
#define RA_DECLARE_KERNEL(...) \
    namespace baseline {       \
    __VA_ARGS__;               \
    }                          \
    namespace avx2 {           \
    __VA_ARGS__;               \
    }                          \
    namespace avx512 {         \
    __VA_ARGS__;               \
    }

std::vector<std::string> built_isas();     // what was compiled in, weakest first
std::vector<std::string> usable_isas();    // of those, what this CPU and operating system can run
Isa selected_isa();                        // the strongest usable one, unless select_isa chose
void select_isa(const std::string& name);  // std::invalid_argument when unknown or not usable here
void limit_isa(const std::string& name);   // selects it, and stronger ones count as not usable from now on
const char* isa_name(Isa isa);

}  // namespace reinforce_ada
