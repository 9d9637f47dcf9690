#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dtype.h"
#include "common/huge_pages.h"
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
RA_INLINE Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }  // false for NaN
RA_INLINE Mask is_nan(F32 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
RA_INLINE F32 select(Mask condition, F32 yes, F32 no) { return _mm512_mask_blend_ps(condition, no, yes); }
RA_INLINE I32 decrease(I32 x, Mask condition) {
    return (I32)_mm512_mask_sub_epi32((__m512i)x, condition, (__m512i)x, _mm512_set1_epi32(1));
}
#else
typedef I32 Mask;
RA_INLINE Mask less(F32 a, F32 b) { return a < b; }
RA_INLINE Mask is_nan(F32 x) { return x != x; }
RA_INLINE F32 select(Mask condition, F32 yes, F32 no) { return (F32)(((I32)yes & condition) | ((I32)no & ~condition)); }
RA_INLINE I32 decrease(I32 x, Mask condition) { return x + condition; }
#endif

RA_INLINE F32 select(Mask condition, float yes, F32 no) { return select(condition, broadcast(yes), no); }
RA_INLINE F32 clamp(F32 x, F32 low, F32 high) { return min(high, max(low, x)); }  // NaN stays NaN
RA_INLINE F32 magnitude(F32 x) { return (F32)((I32)x & 0x7fffffff); }

// e^x and e^x - 1 - x, the k3 estimate, for |x| <= kExponentBound. The latter comes from the polynomial where |x| < .35: the
// difference of numbers near 1 would leave 10 % of it at x = 1e-3.
struct Exponential {
    F32 value, excess;
};

RA_INLINE Exponential exponential(F32 x) {
    const F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const F32 shifted = fma(x, broadcast(1.44269504f), magic);
    const F32 n = shifted - magic;
    F32 r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first with 9 bits: n times it is exact
    r = fma(n, broadcast(2.12194440e-4f), r);
    F32 q = broadcast(1.0f / 5040);  // Taylor: |r| <= .347 leaves 6e-9 of r^2
    q = fma(q, r, broadcast(1.0f / 720));
    q = fma(q, r, broadcast(1.0f / 120));
    q = fma(q, r, broadcast(1.0f / 24));
    q = fma(q, r, broadcast(1.0f / 6));
    q = fma(q, r, broadcast(0.5f));
    const F32 rest = q * (r * r);
    const F32 power = (F32)(((I32)shifted << 23) + 0x3f800000);
    const F32 value = ((rest + r) + 1.0f) * power;
    return {value, select(less(magnitude(n), broadcast(0.5f)), rest, value - 1.0f - x)};
}

// One tensor with a value a token.
struct Stream {
    const void* data;
    DType dtype;

    explicit operator bool() const { return data != nullptr; }

    // Tokens [at, at + count) in fp32: the tensor itself, or a conversion of it in `room`.
    const float* values(int64_t at, int64_t count, float* room) const {
        if (!data) return nullptr;
        if (dtype == DType::float32) return static_cast<const float*>(data) + at;
        if (dtype == DType::bfloat16)
            widen_to(room, static_cast<const BFloat16*>(data) + at, count);
        else
            widen_to(room, static_cast<const Float16*>(data) + at, count);
        return room;
    }

  private:
    template <class T>
    static void widen_to(float* room, const T* p, int64_t count) {
        int64_t at = 0;
        for (; at + kLanes <= count; at += kLanes) store(room + at, load(p + at));
        if (at < count) store(room + at, load_first(p + at, static_cast<int>(count - at), 0.0f));
    }
};

template <class T>
void narrow_to(T* p, const float* values, int64_t count) {
    int64_t at = 0;
    for (; at + kLanes <= count; at += kLanes) store(p + at, load(values + at));
    if (at < count) store_first(p + at, load(values + at), static_cast<int>(count - at));
}

// A gradient that is computed in fp32 and kept in its own type.
struct Output {
    void* data;
    DType dtype;

    explicit operator bool() const { return data != nullptr; }

    // Where the values of tokens from `at` on are to be put before they are handed to keep().
    float* target(int64_t at, float* room) const { return dtype == DType::float32 && data ? static_cast<float*>(data) + at : room; }
    void keep(int64_t at, const float* values, int64_t count) const {
        if (data && dtype == DType::bfloat16) narrow_to(static_cast<BFloat16*>(data) + at, values, count);
        if (data && dtype == DType::float16) narrow_to(static_cast<Float16*>(data) + at, values, count);
    }
};

struct Inputs {
    Stream logp, old, rollout, ref, entropy;
    const float* advantages;
    bool advantages_per_token;
    const void* mask;
    bool float_mask;
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
        double sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
        return sum;
    }
};

RA_INLINE int64_t count(I32 lanes) {  // of what decrease() was called with
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum -= lanes[lane];
    return sum;
}

// The sums over one strip, a lane each.
struct StripSums {
    F32 loss{}, d{}, k3{}, ratio{}, gap{}, gap_k3{}, weight{}, weight_square{}, kl{}, entropy{};
    I32 tokens{}, clipped_low{}, clipped_high{}, clipped_dual{};  // minus the counts
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);
};

// The same over a chunk.
struct ChunkSums {
    Sum loss, d, k3, ratio, gap, gap_k3, weight, weight_square, kl, entropy;
    I32 tokens{}, clipped_low{}, clipped_high{}, clipped_dual{};
    F32 ratio_min = broadcast(kInfinity), ratio_max = broadcast(-kInfinity), weight_max = broadcast(-kInfinity);

    void operator+=(const StripSums& s) {
        loss.add(s.loss), d.add(s.d), k3.add(s.k3), ratio.add(s.ratio), gap.add(s.gap), gap_k3.add(s.gap_k3);
        weight.add(s.weight), weight_square.add(s.weight_square), kl.add(s.kl), entropy.add(s.entropy);
        tokens += s.tokens, clipped_low += s.clipped_low, clipped_high += s.clipped_high, clipped_dual += s.clipped_dual;
        ratio_min = min(ratio_min, s.ratio_min), ratio_max = max(ratio_max, s.ratio_max), weight_max = max(weight_max, s.weight_max);
    }
    Partial total(double share) const {
        Partial p;
        p.loss = loss.total() * share, p.d = d.total(), p.k3 = k3.total(), p.ratio = ratio.total();
        p.gap = gap.total(), p.gap_k3 = gap_k3.total(), p.weight = weight.total(), p.weight_square = weight_square.total();
        p.kl = kl.total(), p.entropy = entropy.total(), p.tokens = static_cast<double>(count(tokens));
        p.clipped_low = static_cast<double>(count(clipped_low)), p.clipped_high = static_cast<double>(count(clipped_high));
        p.clipped_dual = static_cast<double>(count(clipped_dual));
        p.ratio_min = -max_lanes(-ratio_min), p.ratio_max = max_lanes(ratio_max), p.weight_max = max_lanes(weight_max);
        return p;
    }
};

// Up to kLanes neighbouring tokens.
struct Block {
    int64_t at;
    int count;
    Mask keep;

    RA_METHOD F32 read(const float* p) const {  // 0 where the mask is
#if defined(__AVX512F__)
        return _mm512_maskz_loadu_ps(keep, p + at);
#else
        return select(keep, count == kLanes ? load(p + at) : load_first(p + at, count, 0.0f), F32{});
#endif
    }
    RA_METHOD void write(float* p, F32 x) const {
        if (count == kLanes)
            store(p + at, x);
        else
            store_first(p + at, x, count);
    }
};

// The mask of tokens [at, at + count), count <= kLanes.
RA_INLINE Mask read_mask(const Inputs& in, int64_t at, int count) {
    if (in.float_mask) {
        const float* p = static_cast<const float*>(in.mask) + at;
        const F32 x = count == kLanes ? load(p) : load_first(p, count, 0.0f);
        return less(F32{}, magnitude(x)) | is_nan(x);
    }
    const auto* p = static_cast<const std::uint8_t*>(in.mask) + at;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<Mask>((1u << count) - 1), p);
    return _mm_test_epi8_mask(bytes, bytes);
#else
    typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));
    U8 bytes{};
    std::memcpy(&bytes, p, count == kLanes ? kLanes : count);
    return __builtin_convertvector(bytes, I32) != 0;
#endif
}

// Calls body on blocks of [0, count) whose masks are those of tokens [at, at + count).
template <class Body>
RA_INLINE void for_blocks(const Inputs& in, int64_t at, int64_t count, const Body& body) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) body(Block{k, kLanes, read_mask(in, at + k, kLanes)});
    if (k < count) body(Block{k, static_cast<int>(count - k), read_mask(in, at + k, static_cast<int>(count - k))});
}

int64_t counted(const Inputs& in, int64_t begin, int64_t end) {
    I32 tokens{};
    for_blocks(in, begin, end - begin, [&](const Block& block) { tokens = decrease(tokens, block.keep); });
    return count(tokens);
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
};

Sequence sum_sequence(const Inputs& in, const Settings& s, bool sums_d, int64_t begin, int64_t end, Room& room) {
    Sum d, gap;
    int64_t tokens = 0;
    if (!sums_d && !s.sequence_weight())
        tokens = counted(in, begin, end);
    else
        for (int64_t at = begin; at < end; at += kStrip) {
            const int64_t count = std::min(kStrip, end - at);
            const float *logp = in.logp.values(at, count, room.logp), *old = in.old.values(at, count, room.old);
            const float* rollout = s.sequence_weight() ? in.rollout.values(at, count, room.rollout) : nullptr;
            I32 kept{};
            for_blocks(in, at, count, [&](const Block& block) {
                const F32 l = block.read(logp), l_old = old ? block.read(old) : l;
                d.add(l - l_old);
                if (rollout) gap.add(select(block.keep, rollout_gap(l_old, block.read(rollout), s), F32{}));
                kept = decrease(kept, block.keep);
            });
            tokens += RA_ISA::count(kept);
        }
    Sequence sequence;
    sequence.tokens = static_cast<double>(tokens);
    sequence.log_ratio = static_cast<float>(d.total() / std::max(sequence.tokens, 1.0));
    if (s.sequence_weight()) {
        const F32 bound = broadcast(s.ratio_bound);
        sequence.weight = weigh(exponential(clamp(broadcast(static_cast<float>(gap.total())), -bound, bound)).value, s)[0];
    }
    return sequence;
}

// Up to kStrip tokens from `at` on, all in fp32. What is not given is nullptr.
struct Strip {
    int64_t at, count;
    const float *logp, *old, *rollout, *ref, *entropy, *advantage;
    const float *share, *log_ratio, *weight, *extra;  // of their sequence
    float *grad, *grad_entropy, *through;
};

// The loss of a token before aggregation and its derivative with respect to the token's logprob.
struct Term {
    F32 loss, slope;
};

RA_INLINE Term clipped(F32 ratio, F32 slope, F32 adv, const Settings& s, Mask keep, StripSums& sums) {
    const F32 bound_low = broadcast(s.low), bound_high = broadcast(s.high);
    const Mask low = less(adv, F32{}) & less(ratio, bound_low) & keep, high = less(F32{}, adv) & less(bound_high, ratio) & keep;
    sums.clipped_low = decrease(sums.clipped_low, low);
    sums.clipped_high = decrease(sums.clipped_high, high);
    F32 loss = -adv * select(low, bound_low, select(high, bound_high, ratio));
    slope = select(low | high, F32{}, -adv * slope);
    if (s.dual < kInfinity) {
        const F32 most = -adv * s.dual;
        const Mask dual = less(adv, F32{}) & less(most, loss) & keep;
        sums.clipped_dual = decrease(sums.clipped_dual, dual);
        loss = select(dual, most, loss);
        slope = select(dual, F32{}, slope);
    }
    return {loss, slope};
}

struct KlTerm {
    F32 value, slope;
};

RA_INLINE KlTerm estimate(F32 x, const Settings& s) {
    KlTerm kl{x, broadcast(1.0f)};
    switch (s.kl) {
        case Kl::k1:
            break;
        case Kl::k2:
            kl = {x * x * 0.5f, x};
            break;
        case Kl::abs:
            kl = {magnitude(x), select(less(x, F32{}), -1.0f, select(less(F32{}, x), 1.0f, x))};
            break;
        case Kl::k3: {
            const F32 bound = broadcast(s.kl_x_bound), y = clamp(-x, -bound, bound), most = broadcast(s.kl_bound);
            const Exponential e = exponential(y);
            const Mask outside = less(bound, magnitude(x)) | less(most, e.excess);
            kl = {min(most, e.excess), select(outside, F32{}, -(e.excess + y))};
        }
    }
    if (s.straight_through) kl.slope = x;
    return kl;
}

// Which tensors a sweep is compiled for: exactly those, with ratios and weights of tokens. kAnything looks at what there is.
constexpr int kAnything = -1, kOld = 1, kRollout = 2, kRef = 4;

template <Loss kLoss, int kTensors>
void sweep(const Inputs& in, const Settings& s, const Strip& strip, float common_share, ChunkSums& chunk) {
    constexpr bool kGeneral = kTensors == kAnything;
    const bool has_old = kGeneral ? strip.old != nullptr : (kTensors & kOld) != 0;
    const bool has_rollout = kGeneral ? strip.rollout != nullptr : (kTensors & kRollout) != 0;
    const bool has_ref = kGeneral ? strip.ref != nullptr : (kTensors & kRef) != 0;
    const F32 ratio_bound = broadcast(s.ratio_bound), one = broadcast(1.0f);
    const Settings settings = s;
    StripSums sums;

    for_blocks(in, strip.at, strip.count, [&](const Block& block) {
        const Mask keep = block.keep;
        const F32 logp = block.read(strip.logp), adv = block.read(strip.advantage);
        const F32 share = strip.share ? block.read(strip.share) : broadcast(common_share);
        sums.tokens = decrease(sums.tokens, keep);

        F32 old = logp, ratio = one, slope = one;
        if (has_old) {
            old = block.read(strip.old);
            const F32 d = logp - old, bounded = clamp(d, -ratio_bound, ratio_bound);
            const Exponential e = exponential(bounded);
            sums.d += bounded;
            sums.k3 += e.excess;
            ratio = e.value;
            slope = select(less(ratio_bound, magnitude(d)), F32{}, ratio);
            if (kGeneral && strip.log_ratio) {
                const F32 mean = block.read(strip.log_ratio);
                const F32 most = kLoss == Loss::gspo ? broadcast(kSequenceLogRatioBound) : ratio_bound;
                const F32 least = kLoss == Loss::gspo ? broadcast(-kExponentBound) : -ratio_bound;
                ratio = exponential(clamp(mean, least, most)).value;
                slope = select(less(most, mean) | less(mean, least), F32{}, ratio);
            }
            sums.ratio += select(keep, ratio, F32{});
            sums.ratio_min = min(select(keep, ratio, broadcast(kInfinity)), sums.ratio_min);
            sums.ratio_max = max(select(keep, ratio, broadcast(-kInfinity)), sums.ratio_max);
        }

        Term term;
        constexpr bool kThroughRatio = kLoss == Loss::ppo || kLoss == Loss::gspo || kLoss == Loss::sapo;
        if constexpr (kLoss == Loss::reinforce) {
            term = {-adv * logp, -adv};
        } else if constexpr (kLoss == Loss::cispo) {
            const F32 low = broadcast(settings.low), high = broadcast(settings.high);
            sums.clipped_low = decrease(sums.clipped_low, less(ratio, low) & keep);
            sums.clipped_high = decrease(sums.clipped_high, less(high, ratio) & keep);
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
            term = clipped(ratio, slope, adv, settings, keep, sums);
        }

        if (has_rollout) {
            const F32 difference = rollout_gap(old, block.read(strip.rollout), settings);
            const F32 gap = clamp(difference, -ratio_bound, ratio_bound);
            const Exponential e = exponential(gap);
            sums.gap += gap;
            sums.gap_k3 += e.excess;
            if (settings.correction != Correction::none) {
                const F32 own = kGeneral && strip.weight ? block.read(strip.weight) : weigh(e.value, settings);
                const F32 weight = select(keep, own, F32{});
                sums.weight += weight;
                sums.weight_square = fma(weight, weight, sums.weight_square);
                sums.weight_max = max(select(keep, weight, broadcast(-kInfinity)), sums.weight_max);
                term = {term.loss * weight, term.slope * weight};
            }
        }

        F32 through{}, direct = term.slope;
        if (kGeneral && strip.through && kThroughRatio) through = term.slope, direct = F32{};
        if (has_ref) {
            const KlTerm kl = estimate(logp - block.read(strip.ref), settings);
            sums.kl += kl.value;
            F32 value = kl.value * settings.kl_coef, kl_slope = kl.slope * settings.kl_coef;
            if (kGeneral && settings.kl_weighted) {
                kl_slope = kl_slope * ratio;
                (strip.through ? through : kl_slope) += value * slope;
                value = value * ratio;
            }
            term.loss += value;
            direct += kl_slope;
        }
        F32 grad = direct * share;
        if (kGeneral && strip.through) {
            block.write(strip.through, select(keep, through * share, F32{}));
            grad += block.read(strip.extra);
        }
        if (kGeneral && strip.entropy) {
            const F32 entropy = block.read(strip.entropy);
            sums.entropy += entropy;
            term.loss -= entropy * settings.entropy_coef;
            if (strip.grad_entropy) block.write(strip.grad_entropy, select(keep, share * -settings.entropy_coef, F32{}));
        }
        sums.loss += select(keep, strip.share ? term.loss * share : term.loss, F32{});
        block.write(strip.grad, select(keep, grad, F32{}));
    });
    chunk += sums;
}

using Sweep = void (*)(const Inputs&, const Settings&, const Strip&, float, ChunkSums&);

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
    const bool special = in.entropy || s.sequence_ratio || s.sequence_weight() || s.kl_weighted;
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
            sweep_(in_, s_, strip, static_cast<float>(common), sums);
            if (spread_) add_through(sequence, at, count);
            grad_.keep(at, room_.grad, count);
            grad_entropy_.keep(at, room_.grad_entropy, count);
        }
        return sums.total(common);
    }

    Strip take(int64_t at, int64_t count) {
        return {at,
                count,
                in_.logp.values(at, count, room_.logp),
                in_.old.values(at, count, room_.old),
                in_.rollout.values(at, count, room_.rollout),
                in_.ref.values(at, count, room_.ref),
                in_.entropy.values(at, count, room_.entropy),
                in_.advantages_per_token ? in_.advantages + at : room_.advantage,
                own_share_ ? room_.share : nullptr,
                sequence_ratio_ ? room_.log_ratio : nullptr,
                s_.sequence_weight() ? room_.weight : nullptr,
                spread_ ? room_.extra : nullptr,
                grad_.target(at, room_.grad),
                grad_entropy_ ? grad_entropy_.target(at, room_.grad_entropy) : nullptr,
                spread_ ? room_.through : nullptr};
    }

    // Calls body(sequence, position in the strip, tokens) for the part of every sequence in tokens [at, at + count).
    template <class Body>
    void for_parts(int64_t& sequence, int64_t at, int64_t count, const Body& body) {
        for (int64_t k = 0; k < count;) {
            while (in_.end(sequence) <= at + k) ++sequence;
            const int64_t part = std::min(in_.end(sequence), at + count) - (at + k);
            body(sequence, k, part);
            k += part;
        }
    }

    // What a sequence's tokens share, once for each token.
    void fill(int64_t at, int64_t count) {
        while (in_.end(at_sequence_) <= at) ++at_sequence_;
        if (filled_ == at_sequence_ && in_.end(filled_) >= at + count) return;  // a long sequence: all of it is there already
        for_parts(at_sequence_, at, count, [&](int64_t i, int64_t k, int64_t part) {
            if (!in_.advantages_per_token) put(room_.advantage + k, in_.advantages[i], part);
            if (sequences_.empty()) return;
            const Sequence& sequence = of(i);
            if (own_share_) put(room_.share + k, sequence.share, part);
            if (sequence_ratio_) put(room_.log_ratio + k, sequence.log_ratio, part);
            if (s_.sequence_weight()) put(room_.weight + k, sequence.weight, part);
            if (spread_) put(room_.extra + k, static_cast<float>(sequence.through / std::max(sequence.tokens, 1.0)), part);
        });
        filled_ = in_.begin(at_sequence_) <= at && count == kStrip ? at_sequence_ : -1;
    }

    RA_METHOD void put(float* p, float value, int64_t count) {
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
                    found[c] = counted(in, in.begin(starts[c]), in.begin(starts[c + 1]));
                else
                    for (int64_t i = starts[c]; i < starts[c + 1]; ++i) found[c] += counted(in, in.begin(i), in.end(i)) > 0;
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

int64_t first_wrong_offset(const int64_t* cu_seqlens, int64_t sequences, int64_t total) {
    bool wrong = cu_seqlens[0] != 0 || cu_seqlens[sequences] != total;
    for (int64_t i = 0; i < sequences; ++i) wrong |= cu_seqlens[i + 1] < cu_seqlens[i];  // no early exit: it is one vector compare
    if (!wrong) return -1;
    if (cu_seqlens[0] != 0) return 0;
    for (int64_t i = 0; i < sequences; ++i)
        if (cu_seqlens[i + 1] < cu_seqlens[i] || cu_seqlens[i + 1] > total) return i + 1;
    return sequences;
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
                    advantages,
                    advantages_per_token,
                    mask,
                    float_mask,
                    cu_seqlens,
                    width};
    const auto number = [&](Number which) { return numbers[static_cast<std::size_t>(which)]; };
    const Settings s(numbers);
    const LossAgg agg = static_cast<LossAgg>(number(Number::loss_agg));
    const Output out{grad, in.logp.dtype}, out_entropy{grad_entropy, in.entropy.dtype};
    const std::vector<int64_t> starts = chunk_starts(in, num_sequences);
    Denominators den{number(Number::num_tokens), number(Number::num_seqs), number(Number::norm_length)};
    count_missing(in, starts, num_tokens_total, agg, den, num_threads);

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
