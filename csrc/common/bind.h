// From a kernel of raw pointers to a Python function of addresses, for the build that is selected when it is called.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "common/isa.h"

namespace reinforce_ada {

// Python passes a tensor's data_ptr(); 0 is nullptr.
template <class T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T to_kernel(FromPython<T> value) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(value);
    else
        return value;
}

template <class R, class... Args>
auto of_addresses(R (*function)(Args...)) {
    return [function](FromPython<Args>... args) -> R { return function(to_kernel<Args>(args)...); };
}

template <class R, class... Args, std::size_t N>
auto dispatched(std::array<R (*)(Args...), N> builds) {
    return [builds](FromPython<Args>... args) -> R { return builds[static_cast<std::size_t>(selected_isa())](to_kernel<Args>(args)...); };
}

#ifdef RA_HAVE_AVX
#define RA_KERNEL(name) ::reinforce_ada::dispatched(std::array{&baseline::name, &avx2::name, &avx512::name})
#else
#define RA_KERNEL(name) ::reinforce_ada::dispatched(std::array{&baseline::name})
#endif

}  // namespace reinforce_ada
