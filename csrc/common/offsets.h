// Offsets of sequences or groups that lie one after the other.
#pragma once

#include <cstdint>

namespace reinforce_ada::RA_ISA {

// The first index at which offsets [count + 1] does not start at 0, decreases, passes `end` or fails to end there; -1 if right.
inline std::int64_t first_wrong_offset(const std::int64_t* offsets, std::int64_t count, std::int64_t end) {
    bool wrong = offsets[0] != 0 || offsets[count] != end;
    for (std::int64_t i = 0; i < count; ++i) wrong |= offsets[i + 1] < offsets[i];  // no early exit: it is one vector compare
    if (!wrong) return -1;
    if (offsets[0] != 0) return 0;
    for (std::int64_t i = 0; i < count; ++i)
        if (offsets[i + 1] < offsets[i] || offsets[i + 1] > end) return i + 1;
    return count;
}

}  // namespace reinforce_ada::RA_ISA
