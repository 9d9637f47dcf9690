// The words of a launch.
#pragma once

#include <cstdint>

namespace reinforce_ada {

// A number of a call, for messages.
struct Size {
    const char* name;
    std::int64_t value;
};

struct Grid {
    std::int64_t x, y = 1;
};

// Where a call runs: torch's index of a device, and the address of one of its streams (0 is the default one).
struct Queue {
    int device;
    std::uintptr_t stream;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A type that is not deduced from an argument.
template <class T>
struct Exactly {
    using type = T;
};

}  // namespace reinforce_ada
