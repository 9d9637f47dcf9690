#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/huge_pages.h"
#include "common/offsets.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "ops/group_advantages/group_advantages.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kBlock = 4096;             // rows of one partial sum over the batch; fixed, so that threads do not change the result
constexpr int64_t kNear = int64_t{1} << 19;  // bytes of a table that stays in the L2 cache
constexpr int64_t kAhead = 32;               // rows a table is prefetched ahead: as many misses as a core can have in flight

// As many rows, or groups, at a time as a register holds in double.
constexpr int64_t kWide = kLanes / 2;
typedef double F64 __attribute__((vector_size(8 * kWide)));
typedef std::int64_t I64 __attribute__((vector_size(8 * kWide)));
typedef float Half __attribute__((vector_size(4 * kWide)));
typedef double Two __attribute__((vector_size(16)));

// Said in intrinsics because compilers take vectors apart to convert them.
RA_INLINE F64 widen(Half v) {
#if defined(__AVX512F__)
    return _mm512_cvtps_pd(v);
#elif defined(__AVX2__)
    return _mm256_cvtps_pd(v);
#else
    return __builtin_convertvector(v, F64);
#endif
}

RA_INLINE Half narrow(F64 v) {
#if defined(__AVX512F__)
    return _mm512_cvtpd_ps(v);
#elif defined(__AVX2__)
    return _mm256_cvtpd_ps(v);
#else
    return __builtin_convertvector(v, Half);
#endif
}

RA_INLINE F64 load_wide(const float* r) {
    Half v;
    std::memcpy(&v, r, sizeof v);
    return widen(v);
}

// As many of r[0], r[1], ... as exist, `left`, and zeros.
RA_INLINE F64 load_wide(const float* r, int64_t left) {
    if (left >= kWide) return load_wide(r);
    float buffer[kWide] = {};
    for (int64_t k = 0; k < left; ++k) buffer[k] = r[k];
    return load_wide(buffer);
}

RA_INLINE F64 gather(const double* p, const int64_t* at) {
    F64 v{};
    for (int64_t k = 0; k < kWide; ++k) v[k] = p[at[k]];
    return v;
}

RA_INLINE F64 sqrt_each(F64 v) {
    double x[kWide];
    std::memcpy(x, &v, sizeof x);
    for (double& y : x) y = std::sqrt(y);
    std::memcpy(&v, x, sizeof x);
    return v;
}

RA_INLINE double sum_of(F64 v) {
#if defined(__AVX512F__)
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
#elif defined(__AVX2__)
    const __m256d four = v;
#endif
#if defined(__AVX2__)
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return two[0] + two[1];
#else
    return v[0] + v[1];
#endif
}

// Whether ids[0] to ids[kWide - 1] are all `id`.
RA_INLINE bool all_are(const int64_t* ids, int64_t id) {
#if defined(__AVX512F__)
    return _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(ids), _mm512_set1_epi64(id)) == 0;
#elif defined(__AVX2__)
    const __m256i other = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids)), _mm256_set1_epi64x(id));
    return _mm256_testz_si256(other, other);
#else
    return ids[0] == id && ids[1] == id;
#endif
}

// Sums of r - shift, where shift is one of the summed rewards: equal rewards then give sum = square = 0 exactly, and the centred
// second moment square - sum^2 / count loses at most a factor `count` to cancellation.
struct Moments {
    double shift, sum, square, count;
};

// Of `count` rewards at r, of which `left` >= count may be read. Without squares there is no need of a shift: n equal fp32 add up
// exactly in double for n < 2^29.
template <bool kSquares>
RA_INLINE Moments moments_of(const float* r, int64_t count, int64_t left) {
    const double shift = kSquares ? r[0] : 0;
    F64 sum{}, square{};
    int64_t i = 0;
    for (; i + kWide <= count; i += kWide) {
        const F64 d = load_wide(r + i) - shift;
        sum += d;
        if (kSquares) square += d * d;
    }
    if (i < count) {
        I64 lane{};
        for (int64_t k = 0; k < kWide; ++k) lane[k] = k;
        const F64 d = lane < count - i ? load_wide(r + i, left - i) - shift : F64{};
        sum += d;
        if (kSquares) square += d * d;
    }
    return {shift, sum_of(sum), kSquares ? sum_of(square) : 0, static_cast<double>(count)};
}

// The moments of as many groups.
class WideMoments {
  public:
    void set(int64_t k, const Moments& m) { shift_[k] = m.shift, sum_[k] = m.sum, square_[k] = m.square, count_[k] = m.count; }
    F64 count() const { return all(count_); }
    F64 mean() const { return all(shift_) + all(sum_) / count(); }
    F64 m2() const {
        const F64 m2 = all(square_) - all(sum_) * all(sum_) / count();
        return m2 < 0 ? F64{} : m2;
    }
    I64 spread() const { return all(square_) != 0; }

  private:
    static F64 all(const double* values) {
        F64 v;
        std::memcpy(&v, values, sizeof v);
        return v;
    }

    double shift_[kWide] = {}, sum_[kWide] = {}, square_[kWide] = {}, count_[kWide] = {};
};

// advantage = (reward - center) * factor, then the class weight.
struct Affine {
    double center, factor;
};

struct WideAffine {
    F64 center, factor;

    Affine operator[](int64_t k) const { return {center[k], factor[k]}; }
};

struct Pool {
    const double *count, *mean, *m2, *min, *max;
};

RA_INLINE F64 divisor(F64 count, F64 m2, I64 spread, double ddof, double eps) {
    const F64 degrees = count - ddof, one = F64{} + 1.0;
    return (degrees > 0) & spread ? sqrt_each(m2 / degrees) + eps : one;
}

// What the advantages of a group need, out of its own moments and its pool.
class Rule {
  public:
    Rule(const Pool& pool, const double* values, const double* class_weights, Baseline baseline, Scale scale, int64_t ddof, double eps,
         bool keep_single)
        : pool_(pool),
          values_(values),
          weights_(class_weights),
          baseline_(baseline),
          scale_(scale),
          pooled_(pool.min && baseline != Baseline::group),
          keep_single_(keep_single),
          ddof_(static_cast<double>(ddof)),
          eps_(eps) {}

    bool needs_moments() const { return needs_squares() || !(pooled_ || baseline_ == Baseline::values); }

    bool needs_squares() const { return scale_ == Scale::group || (scale_ == Scale::pool && !pool_.min); }

    void set_batch(const Moments& m) {
        WideMoments all;
        all.set(0, m);
        batch_ = divisor(all.count(), all.m2(), all.spread(), ddof_, eps_)[0];
    }

    // For the groups g[0] to g[kWide - 1].
    inline __attribute__((always_inline)) WideAffine operator()(const int64_t* g, const WideMoments& own) const {
        WideAffine a = baseline_ == Baseline::values ? WideAffine{gather(values_, g), F64{} + 1.0} : center(g, own);
        if (needs_squares())
            a.factor /= divisor(own.count(), own.m2(), own.spread(), ddof_, eps_);
        else if (scale_ == Scale::pool)
            a.factor /= divisor(gather(pool_.count, g), gather(pool_.m2, g), spread(g), ddof_, eps_);
        else if (scale_ == Scale::batch)
            a.factor /= batch_;
        return a;
    }

    inline __attribute__((always_inline)) Half advantages(F64 rewards, int64_t g, const Affine& a) const {
        F64 x = (rewards - a.center) * a.factor + 0.0;  // + 0.0: an advantage of zero has no sign
        if (weights_) x *= x >= 0 ? F64{} + weights_[2 * g + 1] : F64{} + weights_[2 * g];
        return narrow(x);
    }

    inline __attribute__((always_inline)) float advantage(double reward, int64_t g, const Affine& a) const {
        const double x = (reward - a.center) * a.factor + 0.0;
        return static_cast<float>(weights_ ? x * weights_[2 * g + (x >= 0)] : x);
    }

  private:
    inline __attribute__((always_inline)) WideAffine center(const int64_t* g, const WideMoments& own) const {
        WideAffine a{pooled_ ? gather(pool_.mean, g) : own.mean(), F64{} + 1.0};
        // Moments of equal rewards give center == reward exactly; a pool given as numbers may be off by rounding.
        if (pooled_) a.factor = spread(g) ? a.factor : F64{};
        if (baseline_ == Baseline::leave_one_out || keep_single_) {
            const F64 count = pooled_ ? gather(pool_.count, g) : own.count();
            // r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
            if (baseline_ == Baseline::leave_one_out) a.factor *= count > 1 ? count / (count - 1) : F64{};
            if (keep_single_) a = {count <= 1 ? F64{} : a.center, count <= 1 ? F64{} + 1.0 : a.factor};
        }
        return a;
    }

    inline __attribute__((always_inline)) I64 spread(const int64_t* g) const { return gather(pool_.min, g) != gather(pool_.max, g); }

    Pool pool_;
    const double *values_, *weights_;
    Baseline baseline_;
    Scale scale_;
    bool pooled_, keep_single_;
    double ddof_, eps_, batch_ = 1;
};

// Of all rewards; the blocks have shifts of their own, which join as means do.
Moments batch_moments(const float* rewards, int64_t rows, int num_threads) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    std::vector<Moments> partial(static_cast<std::size_t>(blocks));
    parallel_for(blocks, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t left = rows - b * kBlock;
            partial[b] = moments_of<true>(rewards + b * kBlock, std::min(kBlock, left), left);
        }
    });
    Moments total{rewards[0], 0, 0, static_cast<double>(rows)};
    for (const Moments& m : partial) {
        const double moved = m.shift - total.shift;
        total.square += m.square + moved * (2 * m.sum + moved * m.count);
        total.sum += m.sum + moved * m.count;
    }
    return total;
}

// Rewards and advantages of a call, fp32.
struct Rows {
    const float* rewards;
    float* out;
    int64_t count;
};

// Groups whose rows lie together, so many at a time: the divisions and roots of a register take as long as those of two groups.
template <bool kSquares>
class Together {
  public:
    // Advantages are written a register at a time, past the end of their group too but not past `limit`: up to there the groups that
    // follow overwrite them.
    Together(const Rule& rule, const Rows& rows, int64_t limit) : rule_(rule), rows_(rows), limit_(limit) {}

    inline __attribute__((always_inline)) void add(int64_t g, int64_t begin, int64_t stop) {
        g_[held_] = g, begin_[held_] = begin, stop_[held_] = stop;
        if (rule_.needs_moments()) own_.set(held_, moments_of<kSquares>(rows_.rewards + begin, stop - begin, rows_.count - begin));
        if (++held_ == kWide) flush();
    }

    void flush() {
        const WideAffine a = rule_(g_, own_);
        for (int64_t k = 0; k < held_; ++k) write(g_[k], begin_[k], stop_[k], a[k]);
        held_ = 0;
    }

  private:
    inline __attribute__((always_inline)) void write(int64_t g, int64_t begin, int64_t stop, const Affine& a) {
        for (int64_t i = begin; i < stop; i += kWide) {
            const Half y = rule_.advantages(load_wide(rows_.rewards + i, rows_.count - i), g, a);
            if (i + kWide <= limit_)
                std::memcpy(rows_.out + i, &y, sizeof y);
            else
                for (int64_t k = 0; k < std::min(kWide, stop - i); ++k) rows_.out[i + k] = y[k];
        }
    }

    const Rule& rule_;
    const Rows rows_;
    const int64_t limit_;
    int64_t held_ = 0, g_[kWide] = {}, begin_[kWide], stop_[kWide];
    WideMoments own_;
};

template <bool kSquares>
void packed_rows(const Rule& rule, const Rows& rows, const int64_t* cu_seqlens, int64_t num_groups, int num_threads) {
    parallel_for(num_groups, rows.count, num_threads, [&](int64_t begin, int64_t end) {
        Together<kSquares> groups(rule, rows, cu_seqlens[end]);
        for (int64_t g = begin; g < end; ++g)
            if (cu_seqlens[g] < cu_seqlens[g + 1]) groups.add(g, cu_seqlens[g], cu_seqlens[g + 1]);
        groups.flush();
    });
}

// Where group numbers never descend, each run is summed and written while it is in cache. False, and `out` is half written, where they
// do descend or leave [0, num_groups): that is found on the way, since reading them in advance would take half as long again.
template <bool kSquares>
bool sorted_rows(const Rule& rule, const Rows& rows, const int64_t* ids, int64_t num_groups, int num_threads) {
    const auto above = static_cast<std::uint64_t>(num_groups < 0 ? std::numeric_limits<int64_t>::max() : num_groups);
    std::atomic<bool> sorted{true};
    parallel_for(rows.count, rows.count, num_threads, [&](int64_t begin, int64_t end) {
        Together<kSquares> groups(rule, rows, end);
        while (begin > 0 && begin < end && ids[begin] == ids[begin - 1]) ++begin;  // that run belongs to the piece before
        while (begin < end) {
            const int64_t g = ids[begin];
            int64_t stop = begin;
            while (stop + kWide <= rows.count && all_are(ids + stop, g)) stop += kWide;
            while (stop < rows.count && ids[stop] == g) ++stop;
            if (static_cast<std::uint64_t>(g) >= above || (stop < rows.count && ids[stop] < g)) return sorted.store(false);
            groups.add(g, begin, stop);
            begin = stop;
        }
        groups.flush();
    });
    return sorted.load();
}

// As unsigned numbers, where a negative one is larger than any group.
std::uint64_t largest(const int64_t* ids, int64_t count) {
    std::uint64_t m = 0;
    for (int64_t i = 0; i < count; ++i) m = std::max(m, static_cast<std::uint64_t>(ids[i]));
    return m;
}

int64_t first_outside(const int64_t* ids, int64_t rows, int64_t num_groups) {
    return std::find_if(ids, ids + rows, [&](int64_t g) { return g < 0 || g >= num_groups; }) - ids;
}

// Rows in any order, by a table of two doubles a group: first sum and count of its rewards, then mean and sum of squares about it, then
// center and factor of its advantages. Each step is one random access a row. Sums of fp32 rewards need no shift in double: n equal
// ones add up exactly for n < 2^29.
//
// Prefetched and in huge pages, 4M rows of 512k groups take 7 ms a step. Dealing the rows out to buckets of groups whose sums fit the
// L2 cache first took 26 in all, for the scratch memory it moves; one step fewer with squares from a first reward, in 32 bytes a group,
// takes 18 to 35 ms for it, by how much of the L3 cache the neighbours leave.
class Table {
  public:
    Table(const Rule& rule, const Rows& rows, const int64_t* ids, int64_t room)
        : rule_(rule), rows_(rows), ids_(ids), room_(room), table_(2 * room) {}

    // On one thread, in row order; unless all group numbers are `checked`, those of a block are before they are used. False where one is
    // outside [0, room).
    bool add_up(bool checked) {
        std::uint64_t most = checked ? static_cast<std::uint64_t>(room_ - 1) : 0;
        for (int64_t begin = 0; begin < rows_.count; begin += kBlock) {
            const int64_t end = std::min(begin + kBlock, rows_.count);
            if (!checked) most = std::max(most, largest(ids_ + begin, end - begin));
            if (most >= static_cast<std::uint64_t>(room_)) return false;
            if (rule_.needs_moments()) each(begin, end, [&](int64_t i, int64_t, double* entry) { add(entry, rows_.rewards[i], 1); });
        }
        groups_ = static_cast<int64_t>(most) + 1;
        return true;
    }

    void settle() {
        const bool squares = rule_.needs_squares();
        Scratch<double> counts(squares ? groups_ : 0);
        if (squares) add_squares(counts);
        for (int64_t first = 0; first < groups_; first += kWide) {
            int64_t g[kWide];
            WideMoments own;
            for (int64_t k = 0; k < kWide; ++k) {
                g[k] = std::min(first + k, groups_ - 1);
                const double* t = &table_[2 * g[k]];
                own.set(k, squares ? Moments{t[0], 0, t[1], counts[g[k]]} : Moments{0, t[0], 0, t[1]});
            }
            const WideAffine a = rule_(g, own);
            for (int64_t k = 0; k < kWide; ++k) table_[2 * g[k]] = a.center[k], table_[2 * g[k] + 1] = a.factor[k];
        }
    }

    void write(int num_threads) {
        parallel_for(rows_.count, rows_.count, num_threads, [&](int64_t begin, int64_t end) {
            each(begin, end, [&](int64_t i, int64_t g, const double* entry) {
                rows_.out[i] = rule_.advantage(rows_.rewards[i], g, {entry[0], entry[1]});
            });
        });
    }

  private:
    static inline __attribute__((always_inline)) void add(double* entry, double first, double second) {
        Two sums;
        std::memcpy(&sums, entry, sizeof sums);
        sums += Two{first, second};
        std::memcpy(entry, &sums, sizeof sums);
    }

    void add_squares(Scratch<double>& counts) {
        for (int64_t g = 0; g < groups_; ++g) {
            counts[g] = table_[2 * g + 1];
            table_[2 * g] /= counts[g], table_[2 * g + 1] = 0;
        }
        each(0, rows_.count, [&](int64_t i, int64_t, double* entry) {
            const double d = rows_.rewards[i] - entry[0];
            entry[1] += d * d;
        });
    }

    // body(i, its group, the group's entry), with the entry of a later row under way.
    template <class Body>
    inline __attribute__((always_inline)) void each(int64_t begin, int64_t end, const Body& body) {
        double* const table = table_.data();
        const int64_t* const ids = ids_;
        if (16 * room_ > kNear)
            for (const int64_t stop = end - kAhead; begin < stop; ++begin) {
                __builtin_prefetch(table + 2 * ids[begin + kAhead]);
                body(begin, ids[begin], table + 2 * ids[begin]);
            }
        for (; begin < end; ++begin) body(begin, ids[begin], table + 2 * ids[begin]);
    }

    const Rule& rule_;
    const Rows rows_;
    const int64_t* ids_;
    int64_t room_, groups_ = 0;
    Scratch<double> table_;
};

// -1, or the first index at which ids is outside [0, room).
int64_t any_rows(const Rule& rule, const Rows& rows, const int64_t* ids, int64_t room, bool checked, int num_threads) {
    Table table(rule, rows, ids, room);
    if (!table.add_up(checked)) return first_outside(ids, rows.count, room);
    table.settle();
    table.write(num_threads);
    return -1;
}

// A table of so many groups is small whatever the number of rows.
constexpr int64_t kFewGroups = 65536;

// The same where num_groups may be -1.
int64_t rows_in_any_order(const Rule& rule, const Rows& rows, const int64_t* ids, int64_t num_groups, int num_threads) {
    if (num_groups >= 0) return any_rows(rule, rows, ids, num_groups, false, num_threads);
    // As many groups as rows is room enough for nearly everybody, and in fresh pages it costs nothing before it is touched.
    const bool roomy = rows.count * 16 >= static_cast<int64_t>(kHugePage);
    if (roomy && any_rows(rule, rows, ids, rows.count, false, num_threads) < 0) return -1;
    const std::uint64_t most = largest(ids, rows.count);
    if (static_cast<int64_t>(most) < 0) return first_outside(ids, rows.count, std::numeric_limits<int64_t>::max());
    if (static_cast<int64_t>(most) < 4 * rows.count + kFewGroups)
        return any_rows(rule, rows, ids, static_cast<int64_t>(most) + 1, true, num_threads);
    // Numbers like hashes, of which a table would not fit any memory: their ranks name the same groups.
    std::vector<int64_t> numbers(ids, ids + rows.count), ranks(static_cast<std::size_t>(rows.count));
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    std::transform(ids, ids + rows.count, ranks.begin(),
                   [&](int64_t id) { return std::lower_bound(numbers.begin(), numbers.end(), id) - numbers.begin(); });
    return any_rows(rule, rows, ranks.data(), static_cast<int64_t>(numbers.size()), true, num_threads);
}

// to[i] = from[i] for fp32 and narrower types.
template <class From, class To>
void convert(const From* from, To* to, int64_t rows, int num_threads) {
    parallel_for((rows + kBlock - 1) / kBlock, rows, num_threads, [&](int64_t begin, int64_t end) {
        int64_t i = begin * kBlock;
        const int64_t stop = std::min(end * kBlock, rows);
        for (; i + kLanes <= stop; i += kLanes) store(to + i, load(from + i));
        if (i < stop) store_first(to + i, load_first(from + i, static_cast<int>(stop - i), 0), static_cast<int>(stop - i));
    });
}

}  // namespace

int64_t group_advantages(const void* rewards, int dtype, const int64_t* group_of, const int64_t* cu_seqlens, int64_t num_rows,
                         int64_t num_groups, const double* pool_count, const double* pool_mean, const double* pool_m2,
                         const double* pool_min, const double* pool_max, const double* baseline_values, const double* class_weights,
                         int baseline, int scale, int64_t ddof, double eps, bool keep_single, void* out, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_groups, num_rows);
        if (wrong >= 0) return wrong;
    }
    if (num_rows == 0) return -1;
    Rule rule({pool_count, pool_mean, pool_m2, pool_min, pool_max}, baseline_values, class_weights, static_cast<Baseline>(baseline),
              static_cast<Scale>(scale), ddof, eps, keep_single);

    const auto compute = [&](const float* from, float* to) -> int64_t {
        const Rows rows{from, to, num_rows};
        if (static_cast<Scale>(scale) == Scale::batch) rule.set_batch(batch_moments(from, num_rows, num_threads));
        if (cu_seqlens)
            (rule.needs_squares() ? packed_rows<true> : packed_rows<false>)(rule, rows, cu_seqlens, num_groups, num_threads);
        else if (!(rule.needs_squares() ? sorted_rows<true> : sorted_rows<false>)(rule, rows, group_of, num_groups, num_threads))
            return rows_in_any_order(rule, rows, group_of, num_groups, num_threads);
        return -1;
    };

    int64_t wrong = -1;
    with_element_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        advise_huge_pages(out, static_cast<std::size_t>(num_rows) * sizeof(T));
        if constexpr (std::is_same_v<T, float>) {
            wrong = compute(static_cast<const float*>(rewards), static_cast<float*>(out));
        } else {
            Scratch<float> wide(2 * num_rows);
            convert(static_cast<const T*>(rewards), wide.data(), num_rows, num_threads);
            wrong = compute(wide.data(), wide.data() + num_rows);
            if (wrong < 0) convert(wide.data() + num_rows, static_cast<T*>(out), num_rows, num_threads);
        }
    });
    return wrong;
}

}  // namespace reinforce_ada::RA_ISA
