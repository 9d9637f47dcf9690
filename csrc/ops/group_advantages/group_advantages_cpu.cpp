#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/huge_pages.h"
#include "common/scratch.h"
#include "common/parallel.h"
#include "ops/group_advantages/group_advantages.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kSums = 8;       // independent sums of a long run: one double addition takes 4 cycles to come back
constexpr int64_t kBlock = 8192;   // rows of one partial sum over the batch; fixed, so that threads do not change the result
constexpr int64_t kPieces = 16;    // of the rows, when they are dealt out; fixed for the same reason
constexpr int64_t kStagger = 152;  // rows between buckets: equally full ones would start in the same cache set

// Sums of r - shift, where shift is one of the summed rewards: equal rewards then give sum = square = 0 exactly, and the centred
// second moment square - sum^2 / count loses at most a factor `count` to cancellation.
struct alignas(32) Moments {
    double shift, sum, square;
    int64_t count;

    double mean() const { return shift + sum / static_cast<double>(count); }
    double m2() const { return std::max(square - sum * sum / static_cast<double>(count), 0.0); }
};

inline void add(Moments& m, double r) {
    const double shift = m.count ? m.shift : r;
    const double d = r - shift;
    m = {shift, m.sum + d, m.square + d * d, m.count + 1};
}

Moments moments_of(const float* r, int64_t count, double shift) {
    if (count < 2 * kSums) {  // most groups: setting up and joining eight sums would take longer than adding the few rows
        Moments m{shift, 0, 0, count};
        for (int64_t i = 0; i < count; ++i) {
            const double d = r[i] - shift;
            m.sum += d;
            m.square += d * d;
        }
        return m;
    }
    double sum[kSums] = {}, square[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums)
        for (int64_t k = 0; k < kSums; ++k) {
            const double d = r[i + k] - shift;
            sum[k] += d;
            square[k] += d * d;
        }
    for (int64_t k = 0; i < count; ++i, ++k) {
        const double d = r[i] - shift;
        sum[k] += d;
        square[k] += d * d;
    }
    Moments m{shift, 0, 0, count};
    for (int64_t k = 0; k < kSums; ++k) m.sum += sum[k], m.square += square[k];
    return m;
}

// advantage = (reward - center) * factor, then the class weight.
struct Affine {
    double center, factor;
};

double divisor(double count, double m2, bool spread, int64_t ddof, double eps) {
    const double degrees = count - static_cast<double>(ddof);
    return degrees > 0 && spread ? std::sqrt(m2 / degrees) + eps : 1.0;
}

// What the advantages of one group need, out of its own moments and its pool.
class Rule {
  public:
    Rule(const double* pool, int64_t num_groups, const double* values, const double* class_weights, Baseline baseline, Scale scale,
         int64_t ddof, double eps)
        : pool_(pool),
          groups_(num_groups),
          values_(values),
          weights_(class_weights),
          baseline_(baseline),
          scale_(scale),
          ddof_(ddof),
          eps_(eps) {}

    bool needs_moments() const {
        const bool reads_pool = baseline_ == Baseline::pool || baseline_ == Baseline::leave_one_out || scale_ == Scale::pool;
        return baseline_ == Baseline::group || scale_ == Scale::group || (reads_pool && !pool_);
    }

    bool needs_squares() const { return scale_ == Scale::group || (scale_ == Scale::pool && !pool_); }

    void set_batch(const Moments& m) { batch_ = divisor(static_cast<double>(m.count), m.m2(), m.square != 0, ddof_, eps_); }

    Affine operator()(int64_t g, const Moments& own) const {
        const bool pooled = pool_ && baseline_ != Baseline::group;
        Affine a{0, 1};
        if (baseline_ == Baseline::values) {
            a.center = values_[g];
        } else {
            // Moments of equal rewards give center == reward exactly; a pool given as numbers may be off by rounding.
            if (pooled && pool(3, g) == pool(4, g)) a.factor = 0;
            a.center = pooled ? pool(1, g) : own.mean();
        }
        if (baseline_ == Baseline::leave_one_out) {
            // r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
            const double n = pooled ? pool(0, g) : static_cast<double>(own.count);
            a.factor *= n > 1 ? n / (n - 1) : 0;
        }
        if (scale_ == Scale::batch) a.factor /= batch_;
        if (needs_squares())
            a.factor /= divisor(static_cast<double>(own.count), own.m2(), own.square != 0, ddof_, eps_);
        else if (scale_ == Scale::pool)
            a.factor /= divisor(pool(0, g), pool(2, g), pool(3, g) != pool(4, g), ddof_, eps_);
        return a;
    }

    float advantage(double reward, int64_t g, const Affine& a) const {
        const double x = (reward - a.center) * a.factor + 0.0;  // + 0.0: an advantage of zero has no sign
        return static_cast<float>(weights_ ? x * weights_[2 * g + (x >= 0)] : x);
    }

    void advantages(const float* r, int64_t count, int64_t g, const Affine& a, float* out) const {
        for (int64_t i = 0; i < count; ++i) out[i] = advantage(r[i], g, a);
    }

  private:
    double pool(int row, int64_t g) const { return pool_[row * groups_ + g]; }

    const double* pool_;
    int64_t groups_;
    const double *values_, *weights_;
    Baseline baseline_;
    Scale scale_;
    int64_t ddof_;
    double eps_, batch_ = 1;
};

Moments batch_moments(const float* rewards, int64_t rows, int num_threads) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    std::vector<Moments> partial(static_cast<std::size_t>(blocks));
    const double shift = rewards[0];
    parallel_for(blocks, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) partial[b] = moments_of(rewards + b * kBlock, std::min(kBlock, rows - b * kBlock), shift);
    });
    Moments total{shift, 0, 0, rows};
    for (const Moments& m : partial) total.sum += m.sum, total.square += m.square;
    return total;
}

bool is_sorted(const int64_t* ids, int64_t rows, int num_threads) {
    std::atomic<bool> sorted{true};
    parallel_for(rows, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = std::max<int64_t>(begin, 1); i < end && sorted.load(std::memory_order_relaxed);) {
            const int64_t stop = std::min(i + kBlock, end);
            bool descends = false;
            for (; i < stop; ++i) descends |= ids[i] < ids[i - 1];
            if (descends) sorted.store(false, std::memory_order_relaxed);
        }
    });
    return sorted.load();
}

// As unsigned numbers, where a negative one is larger than any group.
std::uint64_t largest(const int64_t* ids, int64_t rows, int num_threads) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    std::vector<std::uint64_t> partial(static_cast<std::size_t>(blocks));
    parallel_for(blocks, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            std::uint64_t m = 0;
            for (int64_t i = b * kBlock, stop = std::min(i + kBlock, rows); i < stop; ++i)
                m = std::max(m, static_cast<std::uint64_t>(ids[i]));
            partial[b] = m;
        }
    });
    return *std::max_element(partial.begin(), partial.end());
}

int64_t first_outside(const int64_t* ids, int64_t rows, int64_t num_groups) {
    return std::find_if(ids, ids + rows, [&](int64_t g) { return g < 0 || g >= num_groups; }) - ids;
}

int64_t first_wrong_offset(const int64_t* cu_seqlens, int64_t num_groups, int64_t rows) {
    if (cu_seqlens[0] != 0) return 0;
    for (int64_t g = 0; g < num_groups; ++g)
        if (cu_seqlens[g + 1] < cu_seqlens[g] || cu_seqlens[g + 1] > rows) return g + 1;
    return cu_seqlens[num_groups] == rows ? -1 : num_groups;
}

void one_group(const Rule& rule, const float* rewards, int64_t count, int64_t g, float* out) {
    if (count == 0) return;
    Moments own{};
    if (rule.needs_moments()) own = moments_of(rewards, count, rewards[0]);
    rule.advantages(rewards, count, g, rule(g, own), out);
}

// A group's rows lie together: each run is summed and written while it is in cache.
void sorted_rows(const Rule& rule, const float* rewards, const int64_t* ids, int64_t rows, float* out, int num_threads) {
    parallel_for(rows, rows, num_threads, [&](int64_t begin, int64_t end) {
        while (begin > 0 && begin < end && ids[begin] == ids[begin - 1]) ++begin;  // that run belongs to the piece before
        while (begin < end) {
            int64_t stop = begin + 1;
            while (stop < rows && ids[stop] == ids[begin]) ++stop;
            one_group(rule, rewards + begin, stop - begin, ids[begin], out + begin);
            begin = stop;
        }
    });
}

// Rows in any order: one random access a row to add it up, one to read its group's result back from the same 16 or 32 bytes.
// Sums of fp32 rewards need no shift in double (n equal ones add up exactly for n < 2^29), which halves the table where no square
// is needed.
struct alignas(16) Sums {
    double sum, count;

    void add(double r) { sum += r, count += 1; }
    Moments moments() const { return {0, sum, 0, static_cast<int64_t>(count)}; }
    void settle(const Affine& a) { sum = a.center, count = a.factor; }
    Affine settled() const { return {sum, count}; }
};

struct alignas(32) ShiftedSums {
    double shift, count, sum, square;

    void add(double r) {
        shift = count == 0 ? r : shift;
        const double d = r - shift;
        count += 1, sum += d, square += d * d;
    }
    Moments moments() const { return {shift, sum, square, static_cast<int64_t>(count)}; }
    void settle(const Affine& a) { shift = a.center, count = a.factor; }
    Affine settled() const { return {shift, count}; }
};

// The table fits the L2 cache. One thread adds up, at about 1 ns a row: out-of-order execution overlaps the accesses.
template <class Slot>
void few_groups(const Rule& rule, const float* rewards, const int64_t* ids, int64_t rows, int64_t groups, float* out, int num_threads) {
    std::vector<Slot> slots(static_cast<std::size_t>(groups));
    if (rule.needs_moments())
        for (int64_t i = 0; i < rows; ++i) slots[ids[i]].add(rewards[i]);
    for (int64_t g = 0; g < groups; ++g) slots[g].settle(rule(g, slots[g].moments()));
    parallel_for(rows, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) out[i] = rule.advantage(rewards[i], ids[i], slots[ids[i]].settled());
    });
}

// Groups of a bucket: 512 kB of sums, half of an L2 cache.
template <class Slot>
constexpr int bucket_bits() {
    return sizeof(Slot) == 16 ? 15 : 14;
}

struct Row {
    std::uint32_t in_bucket;
    float value;  // the reward, then the advantage
};

// Where the table would not fit the L2 cache, rows are first dealt out, in row order, to buckets of groups that do; every pass then
// streams. Adding up 4M rows of 512k groups straight into the table took 20 ms on a quiet machine and 100 ms beside others.
template <class Slot>
void many_groups(const Rule& rule, const float* rewards, const int64_t* ids, int64_t rows, int64_t groups, float* out, int num_threads) {
    constexpr int kBits = bucket_bits<Slot>();
    constexpr int64_t kInBucket = int64_t{1} << kBits;
    const int64_t buckets = (groups + kInBucket - 1) >> kBits;
    const auto for_pieces = [&](const auto& body) {  // body(piece, first row, end)
        parallel_for(kPieces, rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) body(p, rows * p / kPieces, rows * (p + 1) / kPieces);
        });
    };
    std::vector<int64_t> starts(static_cast<std::size_t>(kPieces * buckets));  // where each piece's rows of a bucket go
    std::vector<int64_t> firsts(static_cast<std::size_t>(buckets)), ends(firsts);
    for_pieces([&](int64_t p, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++starts[p * buckets + (ids[i] >> kBits)];
    });
    int64_t at = 0;
    for (int64_t b = 0; b < buckets; ++b) {
        firsts[b] = at;
        for (int64_t p = 0; p < kPieces; ++p) at += std::exchange(starts[p * buckets + b], at);
        ends[b] = at;
        at += kStagger;
    }
    const auto starts_of = [&](int64_t p) {
        return std::vector<int64_t>(starts.begin() + p * buckets, starts.begin() + (p + 1) * buckets);
    };

    Scratch<Row> dealt(at);
    for_pieces([&](int64_t p, int64_t begin, int64_t end) {
        std::vector<int64_t> next = starts_of(p);
        for (int64_t i = begin; i < end; ++i)
            dealt[next[ids[i] >> kBits]++] = {static_cast<std::uint32_t>(ids[i] & (kInBucket - 1)), rewards[i]};
    });
    parallel_for(buckets, rows, num_threads, [&](int64_t begin, int64_t end) {
        std::vector<Slot> slots(static_cast<std::size_t>(kInBucket));
        for (int64_t b = begin; b < end; ++b) {
            const int64_t first_group = b * kInBucket, here = std::min(kInBucket, groups - first_group);
            std::fill(slots.begin(), slots.end(), Slot{});
            if (rule.needs_moments())
                for (int64_t i = firsts[b]; i < ends[b]; ++i) slots[dealt[i].in_bucket].add(dealt[i].value);
            for (int64_t g = 0; g < here; ++g) slots[g].settle(rule(first_group + g, slots[g].moments()));
            for (int64_t i = firsts[b]; i < ends[b]; ++i) {
                Row& row = dealt[i];
                row.value = rule.advantage(row.value, first_group + row.in_bucket, slots[row.in_bucket].settled());
            }
        }
    });
    for_pieces([&](int64_t p, int64_t begin, int64_t end) {
        std::vector<int64_t> next = starts_of(p);
        for (int64_t i = begin; i < end; ++i) out[i] = dealt[next[ids[i] >> kBits]++].value;
    });
}

template <class Slot>
void any_rows(const Rule& rule, const float* rewards, const int64_t* ids, int64_t rows, int64_t groups, float* out, int num_threads) {
    // Few rows in many groups: the table's own pages are what takes the time.
    const bool few = groups >> bucket_bits<Slot>() == 0 || rows < groups;
    (few ? few_groups<Slot> : many_groups<Slot>)(rule, rewards, ids, rows, groups, out, num_threads);
}

}  // namespace

int64_t group_advantages(const float* rewards, const int64_t* group_of, const int64_t* cu_seqlens, int64_t num_rows, int64_t num_groups,
                         const double* pool, const double* baseline_values, const double* class_weights, int baseline, int scale,
                         int64_t ddof, double eps, float* out, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_groups, num_rows);
        if (wrong >= 0) return wrong;
    }
    if (num_rows == 0) return -1;
    const bool sorted = cu_seqlens || is_sorted(group_of, num_rows, num_threads);
    if (!cu_seqlens) {
        const bool negative = sorted && group_of[0] < 0;
        const std::uint64_t most =
            sorted ? static_cast<std::uint64_t>(group_of[negative ? 0 : num_rows - 1]) : largest(group_of, num_rows, num_threads);
        if (num_groups < 0 && static_cast<int64_t>(most) >= 0) num_groups = static_cast<int64_t>(most) + 1;
        if (most >= static_cast<std::uint64_t>(std::max<int64_t>(num_groups, 0)))
            return first_outside(group_of, num_rows, num_groups < 0 ? std::numeric_limits<int64_t>::max() : num_groups);
    }
    Rule rule(pool, num_groups, baseline_values, class_weights, static_cast<Baseline>(baseline), static_cast<Scale>(scale), ddof, eps);
    if (static_cast<Scale>(scale) == Scale::batch) rule.set_batch(batch_moments(rewards, num_rows, num_threads));

    advise_huge_pages(out, static_cast<std::size_t>(num_rows) * sizeof(float));
    if (cu_seqlens) {
        parallel_for(num_groups, num_rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; ++g)
                one_group(rule, rewards + cu_seqlens[g], cu_seqlens[g + 1] - cu_seqlens[g], g, out + cu_seqlens[g]);
        });
    } else if (sorted) {
        sorted_rows(rule, rewards, group_of, num_rows, out, num_threads);
    } else {
        const auto rows_in_any_order = rule.needs_squares() ? any_rows<ShiftedSums> : any_rows<Sums>;
        rows_in_any_order(rule, rewards, group_of, num_rows, num_groups, out, num_threads);
    }
    return -1;
}

}  // namespace reinforce_ada::RA_ISA
