// The floating types of tensors. Kernels load them as fp32 and round once, to nearest even, on the way out.
#pragma once

#include <cstdint>

namespace reinforce_ada {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

// As python/reinforce_ada/ops/_torch.py numbers them.
enum class DType : int { float32, bfloat16, float16 };

// Calls body with a null pointer of the element type, from which a generic lambda learns the type.
template <class Body>
inline void with_element_type(int dtype, const Body& body) {
    switch (static_cast<DType>(dtype)) {
        case DType::float32:
            return body(static_cast<float*>(nullptr));
        case DType::bfloat16:
            return body(static_cast<BFloat16*>(nullptr));
        case DType::float16:
            return body(static_cast<Float16*>(nullptr));
    }
}

}  // namespace reinforce_ada
