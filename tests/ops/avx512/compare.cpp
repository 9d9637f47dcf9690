// Each emulated intrinsic beside the instruction, bit for bit, where the processor has it. Prints one line for each that differs.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "emulated.h"

namespace emulated = reinforce_ada::emulated;

namespace {

std::mt19937 random_bits(7);
int failures = 0;

// Any bits, ordinary numbers, what the kernels' functions are given, and the ends of each.
float number() {
    static const float special[] = {0.0f,
                                    -0.0f,
                                    1.0f,
                                    -1.0f,
                                    0.03125f,
                                    -0.03125f,
                                    126.5f,
                                    -126.5f,
                                    128.0f,
                                    -149.0f,
                                    -150.0f,
                                    65504.0f,
                                    65520.0f,
                                    393216.0f,
                                    -393216.0f,
                                    0x1p18f,
                                    -0x1p18f,
                                    0x1p-149f,
                                    -0x1p-149f,
                                    0x1p-126f,
                                    0x1.fffffep127f,
                                    -0x1.fffffep127f,
                                    std::numeric_limits<float>::infinity(),
                                    -std::numeric_limits<float>::infinity(),
                                    std::numeric_limits<float>::quiet_NaN()};
    switch (random_bits() % 4) {
        case 0: {
            const std::uint32_t bits = random_bits();
            float x;
            std::memcpy(&x, &bits, sizeof x);
            return x;
        }
        case 1:
            return special[random_bits() % (sizeof special / sizeof *special)];
        case 2:
            return std::uniform_real_distribution<float>(-160, 140)(random_bits);
        default:
            return std::normal_distribution<float>(0, 1)(random_bits);
    }
}

__m512 numbers() {
    __m512 v;
    for (int lane = 0; lane < 16; ++lane) v[lane] = number();
    return v;
}

__m512 finite_and_not_0() {
    __m512 v = numbers();
    for (int lane = 0; lane < 16; ++lane)
        if (!std::isfinite(v[lane]) || v[lane] == 0) v[lane] = 1;
    return v;
}

__m512i integers() {
    __m512i v;
    for (int lane = 0; lane < 8; ++lane) v[lane] = static_cast<long long>(random_bits()) << 32 | random_bits();
    return v;
}

__m512d doubles() {
    __m512d v;
    for (int lane = 0; lane < 8; ++lane) v[lane] = std::ldexp(number(), static_cast<int>(random_bits() % 200) - 100);
    return v;
}

template <class T>
void same(const char* name, T got, T want) {
    typedef typename std::conditional<sizeof(T) % 4 != 0, std::uint8_t, std::uint32_t>::type Word;
    Word a[sizeof(T) / sizeof(Word)], b[sizeof(T) / sizeof(Word)];
    std::memcpy(a, &got, sizeof got);
    std::memcpy(b, &want, sizeof want);
    if (std::memcmp(a, b, sizeof a) == 0) return;
    ++failures;
    for (std::size_t word = 0; word < sizeof(T) / sizeof(Word); ++word)
        if (a[word] != b[word]) std::printf("%s: word %zu is %08x and should be %08x\n", name, word, unsigned(a[word]), unsigned(b[word]));
}

// The payload of a NaN depends on the order of operands, which compilers may exchange.
template <class T>
T one_nan(T v) {
    for (std::size_t lane = 0; lane < sizeof(T) / sizeof(v[0]); ++lane)
        if (v[lane] != v[lane]) v[lane] = std::numeric_limits<double>::quiet_NaN();
    return v;
}

#define SAME(name, ...) same(#name, emulated::name(__VA_ARGS__), _mm512_##name(__VA_ARGS__))
#define SAME_NUMBERS(name, ...) same(#name, one_nan(emulated::name(__VA_ARGS__)), one_nan(_mm512_##name(__VA_ARGS__)))

void compare_arithmetic() {
    const __m512 x = numbers(), y = numbers(), z = numbers(), scaled = finite_and_not_0();
    SAME_NUMBERS(fmadd_ps, x, y, z);
    SAME_NUMBERS(max_ps, x, y);
    SAME_NUMBERS(min_ps, x, y);
    SAME_NUMBERS(scalef_ps, scaled, y);
    same("reduce_ps", one_nan(emulated::reduce_ps<0x59>(x)), one_nan(_mm512_reduce_ps(x, 0x59)));
    constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512 shift = _mm512_set1_ps(393216.0f);
    same("add_round_ps", one_nan(emulated::add_round_ps<down>(x, shift)), one_nan(_mm512_add_round_ps(x, shift, down)));
    const __m512d d = doubles();
    const double sums[] = {emulated::reduce_add_pd(d), _mm512_reduce_add_pd(d)};
    if (sums[0] == sums[0] || sums[1] == sums[1]) same("reduce_add_pd", sums[0], sums[1]);
}

void compare_conversions() {
    const __m512 x = numbers();
    const __m512i n = integers();
    const __m512d d = doubles();
    const __m256i narrow = _mm512_castsi512_si256(n);
    SAME(cvtepu16_epi32, narrow);
    SAME(cvtepi32_epi16, n);
    SAME_NUMBERS(cvtph_ps, narrow);
    same("cvtps_ph", emulated::cvtps_ph<_MM_FROUND_TO_NEAREST_INT>(x), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    SAME_NUMBERS(cvtps_pd, _mm512_castps512_ps256(x));
    SAME_NUMBERS(cvtpd_ps, d);
}

void compare_moves() {
    const __m512 x = numbers(), y = numbers();
    const __m512i n = integers();
    const __m512d d = doubles();
    SAME(permutex2var_ps, x, n, y);
    SAME(set1_epi32, static_cast<int>(n[0]));
    SAME(set1_epi64, n[0]);
    SAME(castps512_ps256, x);
    SAME(castpd512_pd256, d);
    SAME(extractf32x8_ps, x, 1);
    SAME(extractf64x4_pd, d, 1);
    alignas(64) float memory[32];
    double out[16];
    for (float& at : memory) at = number();
    const auto keep = static_cast<__mmask16>(random_bits());
    SAME(load_ps, memory);
    SAME(loadu_pd, memory + 1);
    SAME(loadu_si512, memory + 1);
    SAME(maskz_loadu_ps, keep, memory + 3);
    emulated::storeu_pd(out, d);
    _mm512_storeu_pd(out + 8, d);
    same("storeu_pd", _mm512_loadu_pd(out), _mm512_loadu_pd(out + 8));
    emulated::stream_ps(memory, x);
    _mm512_stream_ps(memory + 16, x);
    _mm_sfence();
    same("stream_ps", _mm512_load_ps(memory), _mm512_load_ps(memory + 16));
}

void compare_masks() {
    const __m512 x = numbers(), z = numbers();
    __m512 y = numbers();
    __m512i n = integers();
    const __m512i m = integers();
    const auto mask = static_cast<__mmask16>(random_bits());
    for (int lane = 0; lane < 16; ++lane)
        if (random_bits() % 2) y[lane] = x[lane];
    for (int lane = 0; lane < 8; ++lane)
        if (random_bits() % 2) n[lane] = m[lane];
    same("less", emulated::cmp_ps_mask<_CMP_LT_OQ>(x, y), _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ));
    same("differs", emulated::cmp_ps_mask<_CMP_NEQ_OQ>(x, y), _mm512_cmp_ps_mask(x, y, _CMP_NEQ_OQ));
    same("is_nan", emulated::cmp_ps_mask<_CMP_UNORD_Q>(x, x), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
    SAME(cmpneq_epi64_mask, n, m);
    const __m128i bytes = _mm_and_si128(_mm512_castsi512_si128(m), _mm_set1_epi16(0x1011)), others = _mm512_castsi512_si128(n);
    same("test_epi8_mask", emulated::test_epi8_mask(bytes, others), _mm_test_epi8_mask(bytes, others));
    SAME(mask_blend_ps, mask, x, y);
    SAME_NUMBERS(mask_min_ps, z, mask, x, y);
    SAME_NUMBERS(mask_max_ps, z, mask, x, y);
    SAME(mask_sub_epi32, n, mask, n, m);
}

}  // namespace

int main() {
    for (int i = 0; i < 100000 && failures < 10; ++i) {
        compare_arithmetic();
        compare_conversions();
        compare_moves();
        compare_masks();
    }
    return failures != 0;
}
