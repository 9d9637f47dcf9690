#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/offsets.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "ops/policy_loss/policy_loss.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kChunkTokens = 8192;      // whole sequences of at least so many tokens make one partial sum, whatever the threads
constexpr int64_t kStrip = 32 * kLanes;     // tokens between two additions to the double sums: 32 additions in fp32 a lane
constexpr int64_t kRoom = kStrip + kLanes;  // of a strip in a buffer: the last vector may be written whole
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kExponentBound = 88.3f;  // e^88.3 = 2.2e38 is the last to fit fp32, and e^-88.3 becomes zero

#define RA_METHOD inline __attribute__((always_inline))

typedef double F64 __attribute__((vector_size(8 * kLanes)));

// A condition a lane. AVX-512 has registers for it, elsewhere it is a vector of 0 and -1.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
RA_INLINE Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }  // false for NaN, as the next
RA_INLINE Mask differs(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ); }
RA_INLINE Mask is_nan(F32 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
RA_INLINE F32 select(Mask condition, F32 yes, F32 no) { return _mm512_mask_blend_ps(condition, no, yes); }
RA_INLINE I32 decrease(I32 x, Mask condition) {
    return (I32)_mm512_mask_sub_epi32((__m512i)x, condition, (__m512i)x, _mm512_set1_epi32(1));
}
RA_INLINE F32 min_where(Mask condition, F32 x, F32 least) { return _mm512_mask_min_ps(least, condition, x, least); }
RA_INLINE F32 max_where(Mask condition, F32 x, F32 most) { return _mm512_mask_max_ps(most, condition, x, most); }
#else
typedef I32 Mask;
RA_INLINE Mask less(F32 a, F32 b) { return a < b; }
RA_INLINE Mask differs(F32 a, F32 b) { return (a < b) | (b < a); }
RA_INLINE Mask is_nan(F32 x) { return x != x; }
RA_INLINE F32 select(Mask condition, F32 yes, F32 no) { return (F32)(((I32)yes & condition) | ((I32)no & ~condition)); }
RA_INLINE I32 decrease(I32 x, Mask condition) { return x + condition; }
RA_INLINE F32 min_where(Mask condition, F32 x, F32 least) { return min(select(condition, x, least), least); }
RA_INLINE F32 max_where(Mask condition, F32 x, F32 most) { return max(select(condition, x, most), most); }
#endif

RA_INLINE F32 select(Mask condition, float yes, F32 no) { return select(condition, broadcast(yes), no); }
RA_INLINE F32 clamp(F32 x, F32 low, F32 high) { return min(high, max(low, x)); }  // NaN stays NaN

// e^x and e^x - 1 - x, the k3 estimate, for |x| <= kExponentBound. The latter comes from the polynomial where |x| < .35: the
// difference of numbers near 1 would leave 10 % of it at x = 1e-3.
struct Exponential {
    F32 value, excess;
};

RA_INLINE Exponential exponential(F32 x) {
    const F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const F32 shifted = fma(x, broadcast(1.44269504f), magic);
    const F32 n = shifted - magic;
#if defined(__AVX2__)
    const F32 r = fma(n, broadcast(-0.693147182f), x);  // fused: wrong by the 2e-9 n that the constant is
#else
    const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // in two parts, the first with 9 bits: n times it is exact
#endif
    // Minimax in relative error over |r| <= ln 2 / 2 with coefficients rounded to fp32: 1.4e-7.
    const F32 r2 = r * r, low = fma(broadcast(0x1.5554dcp-3f), r, broadcast(0.5f));
    const F32 high = fma(broadcast(0x1.6c6a48p-10f), r2, fma(broadcast(0x1.120c1cp-7f), r, broadcast(0x1.5555bap-5f)));
    const F32 rest = fma(high, r2, low) * r2;
    const F32 power = (F32)(((I32)shifted << 23) + 0x3f800000);
    const F32 value = ((rest + r) + 1.0f) * power;
    return {value, select(differs(n, F32{}), value - 1.0f - x, rest)};
}

// The last strip of a chunk goes through buffers unless it fills its vectors, so that every vector is read and written whole.
RA_INLINE bool is_whole(int64_t count) { return count % kLanes == 0; }

// One tensor with a value a token.
struct Stream {
    const void* data;
    DType dtype;

    explicit operator bool() const { return data != nullptr; }

    // Tokens [at, at + count) in fp32, to be read in whole vectors: the tensor itself, or a copy of it in `room`.
    const float* values(int64_t at, int64_t count, float* room) const {
        if (!data) return nullptr;
        if (dtype == DType::float32 && is_whole(count)) return static_cast<const float*>(data) + at;
        if (dtype == DType::float32)
            copy(room, static_cast<const float*>(data) + at, count);
        else if (dtype == DType::bfloat16)
            copy(room, static_cast<const BFloat16*>(data) + at, count);
        else
            copy(room, static_cast<const Float16*>(data) + at, count);
        return room;
    }

  private:
    template <class T>
    static void copy(float* room, const T* p, int64_t count) {
        int64_t at = 0;
        for (; at + kLanes <= count; at += kLanes) store(room + at, load(p + at));
        if (at < count) store(room + at, load_first(p + at, static_cast<int>(count - at), 0.0f));
    }
};

// A gradient that is computed in fp32 and kept in its own type.
struct Output {
    void* data;
    DType dtype;

    explicit operator bool() const { return data != nullptr; }

    // Where the values of tokens [at, at + count) are to be put before they are handed to keep().
    float* target(int64_t at, int64_t count, float* room) const {
        return dtype == DType::float32 && is_whole(count) ? static_cast<float*>(data) + at : room;
    }
    void keep(int64_t at, const float* values, int64_t count) const {
        if (dtype == DType::bfloat16)
            copy(static_cast<BFloat16*>(data) + at, values, count);
        else if (dtype == DType::float16)
            copy(static_cast<Float16*>(data) + at, values, count);
        else if (!is_whole(count))
            copy(static_cast<float*>(data) + at, values, count);
    }

  private:
    template <class T>
    static void copy(T* p, const float* values, int64_t count) {
        int64_t at = 0;
        for (; at + kLanes <= count; at += kLanes) store(p + at, load(values + at));
        if (at < count) store_first(p + at, load(values + at), static_cast<int>(count - at));
    }
};

// The mask: a byte or a float a token.
struct Kept {
    const void* data;
    bool is_float;

    // Of tokens [at, at + count), as a byte each, 0 behind them.
    const std::uint8_t* bytes(int64_t at, int64_t count, std::uint8_t* room) const {
        const auto* p = static_cast<const std::uint8_t*>(data) + at;
        if (!is_float && is_whole(count)) return p;
        std::memset(room + count / kLanes * kLanes, 0, kLanes);
        if (is_float)
            for (int64_t k = 0; k < count; ++k) room[k] = static_cast<const float*>(data)[at + k] != 0.0f;
        else
            std::memcpy(room, p, static_cast<std::size_t>(count));
        return room;
    }

    int64_t count(int64_t begin, int64_t end) const {
        if (!is_float) return count_bytes(static_cast<const std::uint8_t*>(data) + begin, end - begin);
        int64_t sum = 0;
        for (int64_t k = begin; k < end; ++k) sum += static_cast<const float*>(data)[k] != 0.0f;
        return sum;
    }

  private:
    static int64_t count_bytes(const std::uint8_t* p, int64_t count) {
        typedef std::uint8_t Bytes __attribute__((vector_size(64)));
        int64_t sum = 0;
        while (count >= 64) {
            Bytes counts{};
            for (int turn = 0; turn < 255 && count >= 64; ++turn, p += 64, count -= 64) {
                Bytes bytes;
                std::memcpy(&bytes, p, 64);
                counts -= (Bytes)(bytes != 0);  // true is 255: a lane counts up to 255 of them
            }
            for (int lane = 0; lane < 64; ++lane) sum += counts[lane];
        }
        for (; count >= 8; p += 8, count -= 8) {
            std::uint64_t word;
            std::memcpy(&word, p, 8);
            constexpr std::uint64_t kSeven = 0x7f7f7f7f7f7f7f7f;
            sum += __builtin_popcountll((((word & kSeven) + kSeven) | word) & ~kSeven);  // the high bit of every byte that is not 0
        }
        for (; count > 0; ++p, --count) sum += *p != 0;
        return sum;
    }
};

struct Inputs {
    Stream logp, old, rollout, ref, entropy;
    Stream token_advantages;
    const float* advantages;  // of sequences; nullptr where they are of tokens
    Kept mask;
    const int64_t* cu_seqlens;
    int64_t width;

    int64_t begin(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence] : sequence * width; }
    int64_t end(int64_t sequence) const { return begin(sequence + 1); }
};

struct Settings {
    Loss loss;
    float low, high, dual;  // bounds of the ratio; of the loss for negative advantages
    float ratio_bound;      // of a log-ratio
    Correction correction;
    float weight_low, weight_high, weight_scale;
    Kl kl;
    bool straight_through, kl_weighted, sequence_ratio, allow_missing;
    float kl_coef, kl_x_bound, kl_bound, entropy_coef;

    explicit Settings(const PolicyLossNumbers& numbers) {
        const auto number = [&](Number which) { return numbers[static_cast<std::size_t>(which)]; };
        const auto real = [&](Number which) { return static_cast<float>(number(which)); };
        loss = static_cast<Loss>(number(Number::loss));
        low = static_cast<float>(1 - number(Number::clip_low));
        high = static_cast<float>(1 + number(Number::clip_high));
        dual = real(Number::dual_clip);
        ratio_bound = std::min(real(Number::log_ratio_bound), kExponentBound);
        correction = static_cast<Correction>(number(Number::correction));
        weight_low = real(Number::correction_low);
        weight_high = real(Number::correction_high);
        weight_scale = real(Number::correction_scale);
        kl = static_cast<Kl>(number(Number::kl));
        straight_through = number(Number::straight_through) != 0;
        kl_weighted = number(Number::kl_weighted) != 0;
        sequence_ratio = number(Number::sequence_ratio) != 0;
        allow_missing = number(Number::allow_missing) != 0;
        kl_coef = real(Number::kl_coef);
        kl_bound = real(Number::kl_bound);
        kl_x_bound = kl_bound < kInfinity ? kKlLogRatioBound : kExponentBound;
        entropy_coef = real(Number::entropy_coef);
    }
    bool sequence_weight() const { return correction == Correction::sequence_truncate || correction == Correction::sequence_mask; }
    bool truncate() const { return correction == Correction::token_truncate || correction == Correction::sequence_truncate; }
};

// One chunk's share of the loss and of the metrics.
struct Partial {
    double loss = 0, tokens = 0, d = 0, k3 = 0, ratio = 0, clipped_low = 0, clipped_high = 0, clipped_dual = 0;
    double gap = 0, gap_k3 = 0, weight = 0, weight_square = 0, kl = 0, entropy = 0;
    float ratio_min = kInfinity, ratio_max = -kInfinity, weight_max = -kInfinity;

    void operator+=(const Partial& p) {
        loss += p.loss, tokens += p.tokens, d += p.d, k3 += p.k3, ratio += p.ratio;
        clipped_low += p.clipped_low, clipped_high += p.clipped_high, clipped_dual += p.clipped_dual;
        gap += p.gap, gap_k3 += p.gap_k3, weight += p.weight, weight_square += p.weight_square, kl += p.kl, entropy += p.entropy;
        ratio_min = std::min(ratio_min, p.ratio_min);
        ratio_max = std::max(ratio_max, p.ratio_max);
        weight_max = std::max(weight_max, p.weight_max);
    }
};

// The sum of many vectors, in double.
struct Sum {
    F64 lanes{};

    void add(F32 x) { lanes += __builtin_convertvector(x, F64); }
    double total() const {
        double sum[kLanes];
        std::memcpy(sum, &lanes, sizeof sum);
        for (int half = kLanes / 2; half; half /= 2)
            for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
        return sum[0];
    }
};

RA_INLINE double count(I32 lanes) {  // of what decrease() was called with
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum -= lanes[lane];
    return static_cast<double>(sum);
}

// The sums over one strip, a lane each.
struct StripSums {
    F32 loss{}, d{}, k3{}, ratio{}, gap{}, gap_k3{}, weight{}, weight_square{}, kl{}, entropy{};
    I32 clipped_low{}, clipped_high{}, clipped_dual{};  // minus the counts
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);
};

// The same over a chunk.
struct ChunkSums {
    Sum loss, d, k3, ratio, gap, gap_k3, weight, weight_square, kl, entropy;
    I32 clipped_low{}, clipped_high{}, clipped_dual{};
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);

    void operator+=(const StripSums& s) {
        loss.add(s.loss), d.add(s.d), k3.add(s.k3), ratio.add(s.ratio), gap.add(s.gap), gap_k3.add(s.gap_k3);
        weight.add(s.weight), weight_square.add(s.weight_square), kl.add(s.kl), entropy.add(s.entropy);
        clipped_low += s.clipped_low, clipped_high += s.clipped_high, clipped_dual += s.clipped_dual;
        ratio_min = min(ratio_min, s.ratio_min), ratio_max = max(ratio_max, s.ratio_max), weight_max = max(weight_max, s.weight_max);
    }
    // Of chunks with so many counted tokens; `share` is a token's where that is the same for all, or 1.
    Partial total(double tokens, double share, bool sequence_ratio) const {
        Partial p;
        p.tokens = tokens, p.loss = loss.total() * share, p.d = d.total(), p.k3 = k3.total();
        p.ratio = sequence_ratio ? ratio.total() : tokens + p.d + p.k3;  // k3 is r - 1 - d
        p.gap = gap.total(), p.gap_k3 = gap_k3.total(), p.weight = weight.total(), p.weight_square = weight_square.total();
        p.kl = kl.total(), p.entropy = entropy.total();
        p.clipped_low = count(clipped_low), p.clipped_high = count(clipped_high), p.clipped_dual = count(clipped_dual);
        p.ratio_min = -max_lanes(-ratio_min), p.ratio_max = max_lanes(ratio_max), p.weight_max = max_lanes(weight_max);
        return p;
    }
};

// kLanes neighbouring tokens.
struct Block {
    int64_t at;
    Mask keep;

    RA_METHOD F32 read(const float* p) const {  // 0 where the mask is
#if defined(__AVX512F__)
        return _mm512_maskz_loadu_ps(keep, p + at);
#else
        return select(keep, load(p + at), F32{});
#endif
    }
    RA_METHOD void write(float* p, F32 x) const { store(p + at, x); }
};

RA_INLINE Mask read_mask(const std::uint8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_test_epi8_mask(bytes, bytes);
#else
    typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));
    U8 bytes;
    std::memcpy(&bytes, p, kLanes);
    return __builtin_convertvector(bytes, I32) != 0;
#endif
}

template <class Body>
RA_INLINE void for_blocks(const std::uint8_t* mask, int64_t count, const Body& body) {
    for (int64_t at = 0; at < count; at += kLanes) body(Block{at, read_mask(mask + at)});
}

RA_INLINE F32 weigh(F32 rho, const Settings& s) {
    const F32 low = broadcast(s.weight_low), high = broadcast(s.weight_high);
    const F32 weight = s.truncate() ? clamp(rho, low, high) : select(less(rho, low) | less(high, rho), 0.0f, rho);
    return weight * s.weight_scale;
}

RA_INLINE F32 rollout_gap(F32 old, F32 rollout, const Settings& s) {
    return s.allow_missing ? select(is_nan(rollout), 0.0f, old - rollout) : old - rollout;
}

// What its tokens have in common.
struct Sequence {
    double tokens = 0;    // counted
    float log_ratio = 0;  // mean of d; read where ratios are of sequences
    float weight = 0;     // read where the correction is of sequences
    float share = 0;      // of a token's loss in the aggregate
    double through = 0;   // derivative of the sequence's loss in its log-ratio
};

// Buffers of one thread for one strip.
struct Room {
    float logp[kRoom], old[kRoom], rollout[kRoom], ref[kRoom], entropy[kRoom], advantage[kRoom], share[kRoom], log_ratio[kRoom];
    float weight[kRoom], through[kRoom], extra[kRoom], grad[kRoom], grad_entropy[kRoom];
    std::uint8_t mask[kRoom];
};

Sequence sum_sequence(const Inputs& in, const Settings& s, bool sums_d, int64_t begin, int64_t end, Room& room) {
    Sum d, gap;
    if (sums_d || s.sequence_weight())
        for (int64_t at = begin; at < end; at += kStrip) {
            const int64_t count = std::min(kStrip, end - at);
            const float *logp = in.logp.values(at, count, room.logp), *old = in.old.values(at, count, room.old);
            const float* rollout = s.sequence_weight() ? in.rollout.values(at, count, room.rollout) : nullptr;
            for_blocks(in.mask.bytes(at, count, room.mask), count, [&](const Block& block) {
                const F32 l = block.read(logp), l_old = old ? block.read(old) : l;
                d.add(l - l_old);
                if (rollout) gap.add(rollout_gap(l_old, block.read(rollout), s));
            });
        }
    Sequence sequence;
    sequence.tokens = static_cast<double>(in.mask.count(begin, end));
    if (sums_d) sequence.log_ratio = static_cast<float>(d.total() / std::max(sequence.tokens, 1.0));
    if (s.sequence_weight()) {
        const F32 bound = broadcast(s.ratio_bound);
        sequence.weight = weigh(exponential(clamp(broadcast(static_cast<float>(gap.total())), -bound, bound)).value, s)[0];
    }
    return sequence;
}

// Up to kStrip tokens, all in fp32. What is not given is nullptr.
struct Strip {
    int64_t count;
    const std::uint8_t* mask;
    const float *logp, *old, *rollout, *ref, *entropy, *advantage;
    const float *share, *log_ratio, *weight, *extra;  // of their sequence
    float *grad, *grad_entropy, *through;
};

// The loss of a token before aggregation and its derivative with respect to the token's logprob.
struct Term {
    F32 loss, slope;
};

// Masked tokens have advantage 0 and ratio 1: none of them is clipped.
RA_INLINE Term clipped(F32 ratio, F32 slope, F32 adv, F32 bound_low, F32 bound_high, StripSums& sums) {
    const Mask low = less(adv, F32{}) & less(ratio, bound_low), high = less(F32{}, adv) & less(bound_high, ratio);
    sums.clipped_low = decrease(sums.clipped_low, low);
    sums.clipped_high = decrease(sums.clipped_high, high);
    return {-adv * select(low, bound_low, select(high, bound_high, ratio)), select(low | high, F32{}, -adv * slope)};
}

RA_INLINE Term clipped_twice(Term term, F32 adv, F32 bound, StripSums& sums) {
    const F32 most = -adv * bound;
    const Mask dual = less(adv, F32{}) & less(most, term.loss);
    sums.clipped_dual = decrease(sums.clipped_dual, dual);
    return {select(dual, most, term.loss), select(dual, F32{}, term.slope)};
}

// The estimate from y = l_ref - l, and its derivative in y.
struct KlTerm {
    F32 value, slope;
};

RA_INLINE KlTerm k3_estimate(F32 y, F32 bound, F32 most) {
    const F32 bounded = clamp(y, -bound, bound);
    const Exponential e = exponential(bounded);
    const Mask outside = differs(y, bounded) | less(most, e.excess);
    return {min(most, e.excess), select(outside, F32{}, e.excess + bounded)};
}

RA_INLINE KlTerm estimate(F32 y, const Settings& s) {
    KlTerm kl{-y, broadcast(-1.0f)};
    if (s.kl == Kl::k2) kl = {y * y * 0.5f, y};
    if (s.kl == Kl::abs) kl = {max(-y, y), select(less(y, F32{}), -1.0f, select(less(F32{}, y), 1.0f, y))};
    if (s.kl == Kl::k3) kl = k3_estimate(y, broadcast(s.kl_x_bound), broadcast(s.kl_bound));
    if (s.straight_through) kl.slope = y;
    return kl;
}

// Which tensors a sweep is compiled for: exactly those, with ratios and weights of tokens and k3. kAnything looks at what there is.
constexpr int kAnything = -1, kOld = 1, kRollout = 2, kRef = 4;

template <Loss kLoss, int kTensors>
void sweep(const Settings& settings, const Strip& given, float common_share, ChunkSums& chunk) {
    constexpr bool kGeneral = kTensors == kAnything;
    constexpr bool kThroughRatio = kLoss == Loss::ppo || kLoss == Loss::gspo || kLoss == Loss::sapo;
    const Settings s = settings;  // copies: a store to the gradient cannot change them
    const Strip strip = given;
    const bool has_old = kGeneral ? strip.old != nullptr : (kTensors & kOld) != 0;
    const bool has_rollout = kGeneral ? strip.rollout != nullptr : (kTensors & kRollout) != 0;
    const bool has_ref = kGeneral ? strip.ref != nullptr : (kTensors & kRef) != 0;
    const bool weighs = s.correction != Correction::none, has_dual = s.dual < kInfinity;
    const F32 ratio_bound = broadcast(s.ratio_bound), one = broadcast(1.0f), low = broadcast(s.low), high = broadcast(s.high);
    StripSums sums;

    for_blocks(strip.mask, strip.count, [&](const Block& block) __attribute__((always_inline)) {
        const F32 logp = block.read(strip.logp), adv = block.read(strip.advantage);
        const F32 share = strip.share ? block.read(strip.share) : broadcast(common_share);

        F32 old = logp, ratio = one, slope = one;
        if (has_old) {
            old = block.read(strip.old);
            const F32 d = logp - old, bounded = clamp(d, -ratio_bound, ratio_bound);
            const Exponential e = exponential(bounded);
            sums.d += bounded;
            sums.k3 += e.excess;
            ratio = e.value;
            slope = select(differs(d, bounded), F32{}, ratio);
            if (kGeneral && strip.log_ratio) {
                const F32 mean = block.read(strip.log_ratio);
                const F32 most = kLoss == Loss::gspo ? broadcast(kSequenceLogRatioBound) : ratio_bound;
                const F32 least = kLoss == Loss::gspo ? broadcast(-kExponentBound) : -ratio_bound;
                ratio = exponential(clamp(mean, least, most)).value;
                slope = select(less(most, mean) | less(mean, least), F32{}, ratio);
                sums.ratio += select(block.keep, ratio, F32{});
            }
            sums.ratio_min = min_where(block.keep, ratio, sums.ratio_min);
            sums.ratio_max = max_where(block.keep, ratio, sums.ratio_max);
        }

        Term term;
        if constexpr (kLoss == Loss::reinforce) {
            term = {-adv * logp, -adv};
        } else if constexpr (kLoss == Loss::cispo) {
            sums.clipped_low = decrease(sums.clipped_low, less(ratio, low));  // masked tokens have ratio 1: never
            sums.clipped_high = decrease(sums.clipped_high, less(high, ratio));
            const F32 pull = -adv * clamp(ratio, low, high);
            term = {pull * logp, pull};
        } else if constexpr (kLoss == Loss::sapo) {
            const Mask positive = less(F32{}, adv);
            const F32 tau = select(positive, broadcast(kSapoTauPositive), broadcast(kSapoTauOther));
            const F32 four = select(positive, broadcast(4 / kSapoTauPositive), broadcast(4 / kSapoTauOther));
            const F32 bound = broadcast(kExponentBound), away = exponential(clamp(-tau * (ratio - 1.0f), -bound, bound)).value;
            const F32 gate = 1.0f / (1.0f + away);
            term = {-adv * gate * four, -adv * 4.0f * gate * (gate * away) * slope};
        } else {
            term = clipped(ratio, slope, adv, low, high, sums);
            if (has_dual) term = clipped_twice(term, adv, broadcast(s.dual), sums);
        }

        if (has_rollout) {
            const F32 difference = rollout_gap(old, block.read(strip.rollout), s);
            const F32 gap = clamp(difference, -ratio_bound, ratio_bound);
            const Exponential e = exponential(gap);
            sums.gap += gap;
            sums.gap_k3 += e.excess;
            if (weighs) {
                const F32 own = kGeneral && strip.weight ? block.read(strip.weight) : weigh(e.value, s);
                const F32 weight = select(block.keep, own, F32{});
                sums.weight += weight;
                sums.weight_square = fma(weight, weight, sums.weight_square);
                sums.weight_max = max_where(block.keep, weight, sums.weight_max);
                term = {term.loss * weight, term.slope * weight};
            }
        }

        F32 through{}, direct = term.slope;
        if (kGeneral && strip.through && kThroughRatio) through = term.slope, direct = F32{};
        if (has_ref) {
            const F32 y = block.read(strip.ref) - logp, coef = broadcast(s.kl_coef);
            KlTerm kl;
            if constexpr (kGeneral)
                kl = estimate(y, s);
            else
                kl = k3_estimate(y, broadcast(s.kl_x_bound), broadcast(s.kl_bound));
            sums.kl += kl.value;
            if (kGeneral && s.kl_weighted) {
                (strip.through ? through : direct) += coef * kl.value * slope;
                kl = {kl.value * ratio, kl.slope * ratio};
            }
            term.loss = fma(coef, kl.value, term.loss);
            direct = fma(-coef, kl.slope, direct);
        }
        if (kGeneral && strip.entropy) {
            const F32 entropy = block.read(strip.entropy);
            sums.entropy += entropy;
            term.loss -= entropy * s.entropy_coef;
            if (strip.grad_entropy) block.write(strip.grad_entropy, select(block.keep, share * -s.entropy_coef, F32{}));
        }
        sums.loss = strip.share ? fma(term.loss, share, sums.loss) : sums.loss + term.loss;
        F32 grad = direct * share;
        if (kGeneral && strip.through) {
            block.write(strip.through, through * share);
            grad += block.read(strip.extra);
        }
        if (kGeneral) grad = select(block.keep, grad, F32{});  // k1's derivative is 1 under the mask too
        block.write(strip.grad, grad);
    });
    chunk += sums;
}

using Sweep = void (*)(const Settings&, const Strip&, float, ChunkSums&);

template <Loss kLoss>
Sweep sweep_of(int tensors) {
    switch (tensors) {
        case kOld:
            return sweep<kLoss, kOld>;
        case kOld | kRollout:
            return sweep<kLoss, kOld | kRollout>;
        case kOld | kRollout | kRef:
            return sweep<kLoss, kOld | kRollout | kRef>;
        default:
            return sweep<kLoss, kAnything>;
    }
}

Sweep sweep_of(const Inputs& in, const Settings& s) {
    const bool other_kl = in.ref && (s.kl != Kl::k3 || s.straight_through || s.kl_weighted);
    const bool special = in.entropy || s.sequence_ratio || s.sequence_weight() || other_kl;
    const int tensors = special ? kAnything : (in.old ? kOld : 0) | (in.rollout ? kRollout : 0) | (in.ref ? kRef : 0);
    switch (s.loss) {
        case Loss::reinforce:
            return sweep_of<Loss::reinforce>(tensors);
        case Loss::cispo:
            return sweep_of<Loss::cispo>(tensors);
        case Loss::gspo:
            return sweep<Loss::gspo, kAnything>;
        case Loss::sapo:
            return sweep_of<Loss::sapo>(tensors);
        default:
            return sweep_of<Loss::ppo>(tensors);
    }
}

struct Denominators {
    double tokens, seqs, length;
};

// What one token's loss counts for in the aggregate; `tokens` are those of its sequence.
double share(LossAgg agg, const Denominators& den, double tokens) {
    switch (agg) {
        case LossAgg::token_mean:
            return 1 / den.tokens;
        case LossAgg::seq_mean_token_mean:
            return 1 / (den.seqs * std::max(tokens, 1.0));
        case LossAgg::seq_mean_token_sum:
            return 1 / den.seqs;
        default:
            return 1 / (den.seqs * den.length);
    }
}

// Chunks of whole sequences, in strips.
class Chunks {
  public:
    Chunks(const Inputs& in, const Settings& s, LossAgg agg, const Denominators& den, const Output& grad, const Output& grad_entropy)
        : in_(in),
          s_(s),
          agg_(agg),
          den_(den),
          grad_(grad),
          grad_entropy_(grad_entropy),
          sweep_(sweep_of(in, s)),
          sequence_ratio_(in.old && (s.loss == Loss::gspo || s.sequence_ratio)),
          spread_(s.sequence_ratio),
          own_share_(agg == LossAgg::seq_mean_token_mean) {}

    Partial run(int64_t first, int64_t last) {
        first_ = first, last_ = last;
        if (sequence_ratio_ || spread_ || own_share_ || s_.sequence_weight()) {
            sequences_.resize(static_cast<std::size_t>(last - first));
            for (int64_t i = first; i < last; ++i) {
                Sequence& sequence = of(i);
                sequence = sum_sequence(in_, s_, sequence_ratio_, in_.begin(i), in_.end(i), room_);
                sequence.share = static_cast<float>(share(agg_, den_, sequence.tokens));
            }
        }
        if (spread_) strips();  // the derivative in each sequence's log-ratio, which the next pass spreads over its tokens
        return strips();
    }

  private:
    Sequence& of(int64_t sequence) { return sequences_[static_cast<std::size_t>(sequence - first_)]; }

    Partial strips() {
        const double common = own_share_ ? 1.0 : share(agg_, den_, 0);
        ChunkSums sums;
        at_sequence_ = first_, filled_ = -1;
        const int64_t end = in_.begin(last_);
        for (int64_t at = in_.begin(first_); at < end; at += kStrip) {
            const int64_t count = std::min(kStrip, end - at);
            const int64_t sequence = at_sequence_;
            fill(at, count);
            const Strip strip = take(at, count);
            sweep_(s_, strip, static_cast<float>(common), sums);
            if (spread_) add_through(sequence, at, count);
            grad_.keep(at, room_.grad, count);
            if (grad_entropy_) grad_entropy_.keep(at, room_.grad_entropy, count);
        }
        return sums.total(static_cast<double>(in_.mask.count(in_.begin(first_), end)), common, sequence_ratio_);
    }

    Strip take(int64_t at, int64_t count) {
        return {count,
                in_.mask.bytes(at, count, room_.mask),
                in_.logp.values(at, count, room_.logp),
                in_.old.values(at, count, room_.old),
                in_.rollout.values(at, count, room_.rollout),
                in_.ref.values(at, count, room_.ref),
                in_.entropy.values(at, count, room_.entropy),
                in_.advantages ? room_.advantage : in_.token_advantages.values(at, count, room_.advantage),
                own_share_ ? room_.share : nullptr,
                sequence_ratio_ ? room_.log_ratio : nullptr,
                s_.sequence_weight() ? room_.weight : nullptr,
                spread_ ? room_.extra : nullptr,
                grad_.target(at, count, room_.grad),
                grad_entropy_ ? grad_entropy_.target(at, count, room_.grad_entropy) : nullptr,
                spread_ ? room_.through : nullptr};
    }

    // Calls body(sequence, position in the strip, tokens) for the part of every sequence in tokens [at, at + count).
    template <class Body>
    RA_METHOD int64_t for_parts(int64_t sequence, int64_t at, int64_t count, const Body& body) const {
        const Inputs in = in_;  // a copy: what body stores cannot change it
        for (int64_t k = 0;;) {
            const int64_t end = in.end(sequence) - at, part = std::min(end, count) - k;
            if (part > 0) body(sequence, k, part), k += part;
            if (k == count) return sequence;
            ++sequence;
        }
    }

    // What a sequence's tokens share, once for each token.
    void fill(int64_t at, int64_t count) {
        if (filled_ >= 0 && in_.end(filled_) >= at + count) return;  // a long sequence: all of it is there already
        const int64_t first = at_sequence_;
        if (in_.advantages) {
            const float* advantages = in_.advantages;
            float* room = room_.advantage;
            at_sequence_ = for_parts(first, at, count, [=](int64_t i, int64_t k, int64_t part) { put(room + k, advantages[i], part); });
        }
        if (!sequences_.empty())
            at_sequence_ = for_parts(first, at, count, [&](int64_t i, int64_t k, int64_t part) {
                const Sequence& sequence = of(i);
                if (own_share_) put(room_.share + k, sequence.share, part);
                if (sequence_ratio_) put(room_.log_ratio + k, sequence.log_ratio, part);
                if (s_.sequence_weight()) put(room_.weight + k, sequence.weight, part);
                if (spread_) put(room_.extra + k, static_cast<float>(sequence.through / std::max(sequence.tokens, 1.0)), part);
            });
        filled_ = count == kStrip && in_.begin(at_sequence_) <= at ? at_sequence_ : -1;
    }

    RA_METHOD static void put(float* p, float value, int64_t count) {
        for (int64_t k = 0; k < count; k += kLanes) store(p + k, broadcast(value));
    }

    void add_through(int64_t sequence, int64_t at, int64_t count) {
        for_parts(sequence, at, count, [&](int64_t i, int64_t k, int64_t part) {
            for (int64_t j = k; j < k + part; ++j) of(i).through += room_.through[j];
        });
    }

    const Inputs& in_;
    const Settings& s_;
    const LossAgg agg_;
    const Denominators den_;
    const Output grad_, grad_entropy_;
    const Sweep sweep_;
    const bool sequence_ratio_, spread_, own_share_;
    int64_t first_ = 0, last_ = 0, at_sequence_ = 0, filled_ = -1;
    std::vector<Sequence> sequences_;
    Room room_;
};

// Boundaries of chunks of whole sequences.
std::vector<int64_t> chunk_starts(const Inputs& in, int64_t sequences) {
    std::vector<int64_t> starts{0};
    while (starts.back() < sequences) {
        const int64_t wanted = in.begin(starts.back()) + kChunkTokens;
        int64_t next = sequences;
        if (in.cu_seqlens)
            next = std::lower_bound(in.cu_seqlens + starts.back() + 1, in.cu_seqlens + sequences, wanted) - in.cu_seqlens;
        else if (in.width > 0)
            next = std::min(sequences, starts.back() + (kChunkTokens + in.width - 1) / in.width);
        starts.push_back(next);
    }
    return starts;
}

// What was not given is counted: tokens, sequences with any token, the longest sequence.
void count_missing(const Inputs& in, const std::vector<int64_t>& starts, int64_t total, LossAgg agg, Denominators& den, int num_threads) {
    const bool tokens = agg == LossAgg::token_mean && den.tokens == 0, seqs = agg != LossAgg::token_mean && den.seqs == 0;
    if (tokens || seqs) {
        const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
        std::vector<int64_t> found(static_cast<std::size_t>(pieces));
        parallel_for(pieces, total, num_threads, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c)
                if (tokens)
                    found[c] = in.mask.count(in.begin(starts[c]), in.begin(starts[c + 1]));
                else
                    for (int64_t i = starts[c]; i < starts[c + 1]; ++i) found[c] += in.mask.count(in.begin(i), in.end(i)) > 0;
        });
        int64_t sum = 0;
        for (int64_t n : found) sum += n;
        (tokens ? den.tokens : den.seqs) = static_cast<double>(std::max(sum, int64_t{1}));
    }
    if (agg == LossAgg::seq_mean_token_sum_norm && den.length == 0) {
        int64_t longest = 1;
        for (int64_t i = 0; i < starts.back(); ++i) longest = std::max(longest, in.end(i) - in.begin(i));
        den.length = static_cast<double>(longest);
    }
}

void name_metrics(const Partial& p, int64_t total, double* metrics) {
    const double n = std::max(p.tokens, 1.0);
    const bool any = p.tokens > 0;
    const double values[] = {p.tokens,
                             static_cast<double>(total) - p.tokens,
                             -p.d / n,
                             p.k3 / n,
                             p.ratio / n,
                             any ? p.ratio_min : 0,
                             any ? p.ratio_max : 0,
                             p.clipped_low / n,
                             p.clipped_high / n,
                             p.clipped_dual / n,
                             -p.gap / n,
                             p.gap_k3 / n,
                             p.weight / n,
                             any ? p.weight_max : 0,
                             p.weight_square > 0 ? p.weight * p.weight / (n * p.weight_square) : 0,
                             p.kl / n,
                             p.entropy / n};
    std::copy(std::begin(values), std::end(values), metrics);
}

}  // namespace

int64_t policy_loss(const void* logprobs, int logprobs_dtype, const float* advantages, bool advantages_per_token, const void* mask,
                    bool float_mask, const void* old_logprobs, int old_dtype, const void* rollout_logprobs, int rollout_dtype,
                    const void* ref_logprobs, int ref_dtype, const void* entropy, int entropy_dtype, const int64_t* cu_seqlens,
                    int64_t num_tokens_total, int64_t num_sequences, int64_t width, const PolicyLossNumbers& numbers, float* loss,
                    double* metrics, void* grad, void* grad_entropy, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_sequences, num_tokens_total);
        if (wrong >= 0) return wrong;
    }
    const auto stream = [](const void* data, int dtype) { return Stream{data, static_cast<DType>(dtype)}; };
    const Inputs in{stream(logprobs, logprobs_dtype),
                    stream(old_logprobs, old_dtype),
                    stream(rollout_logprobs, rollout_dtype),
                    stream(ref_logprobs, ref_dtype),
                    stream(entropy, entropy_dtype),
                    Stream{advantages_per_token ? advantages : nullptr, DType::float32},
                    advantages_per_token ? nullptr : advantages,
                    Kept{mask, float_mask},
                    cu_seqlens,
                    width};
    const auto number = [&](Number which) { return numbers[static_cast<std::size_t>(which)]; };
    const Settings s(numbers);
    const LossAgg agg = static_cast<LossAgg>(number(Number::loss_agg));
    const Output out{grad, in.logp.dtype}, out_entropy{grad_entropy, in.entropy.dtype};
    const std::vector<int64_t> starts = chunk_starts(in, num_sequences);
    Denominators den{number(Number::num_tokens), number(Number::num_seqs), number(Number::norm_length)};
    count_missing(in, starts, num_tokens_total, agg, den, num_threads);

    advise_huge_pages(grad, static_cast<std::size_t>(num_tokens_total) * (in.logp.dtype == DType::float32 ? 4 : 2));
    const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
    std::vector<Partial> partial(static_cast<std::size_t>(pieces));
    parallel_for(pieces, num_tokens_total, num_threads, [&](int64_t first, int64_t last) {
        Chunks chunks(in, s, agg, den, out, out_entropy);
        for (int64_t c = first; c < last; ++c) partial[c] = chunks.run(starts[c], starts[c + 1]);
    });
    Partial total;
    for (const Partial& p : partial) total += p;
    *loss = static_cast<float>(total.loss);
    name_metrics(total, num_tokens_total, metrics);
    return -1;
}

}  // namespace reinforce_ada::RA_ISA
