#include "common/isa.h"

#include <atomic>
#include <stdexcept>

namespace reinforce_ada {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

std::atomic<Isa>& limit() {
    static std::atomic<Isa> isa{Isa::avx512};
    return isa;
}

bool cpu_has(Isa isa) {
    if (isa > limit()) return false;
#ifdef RA_HAVE_AVX
    // __builtin_cpu_supports also asks the operating system to save the wide registers. It has no "f16c" in every compiler,
    // but no CPU has AVX2 with FMA and lacks F16C.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#ifdef RA_EMULATED_AVX512
    const bool avx512 = avx2;
#else
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return isa == Isa::baseline || (isa == Isa::avx2 ? avx2 : avx512);
#else
    return isa == Isa::baseline;
#endif
}

Isa strongest() {
    for (Isa isa : {Isa::avx512, Isa::avx2})
        if (cpu_has(isa)) return isa;
    return Isa::baseline;
}

std::atomic<Isa>& selection() {
    static std::atomic<Isa> isa{strongest()};
    return isa;
}

Isa usable_isa(const std::string& name) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
        if (name != isa_name(isa)) continue;
        if (!cpu_has(isa)) throw std::invalid_argument("this CPU or this build lacks " + name);
        return isa;
    }
    throw std::invalid_argument("unknown instruction set " + name);
}

}  // namespace

std::vector<std::string> built_isas() {
#ifdef RA_HAVE_AVX
    return {kNames[0], kNames[1], kNames[2]};
#else
    return {kNames[0]};
#endif
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
        if (cpu_has(isa)) names.emplace_back(isa_name(isa));
    return names;
}

Isa selected_isa() { return selection().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) { selection().store(usable_isa(name), std::memory_order_relaxed); }

void limit_isa(const std::string& name) {
    const Isa isa = usable_isa(name);
    limit().store(isa);
    selection().store(isa);
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace reinforce_ada
