#include "ops/group_advantages/group_advantages.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/parallel.h"

namespace reinforce_ada::RA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kSums = 8;           // independent sums of a long run: one double addition takes 4 cycles to come back
constexpr int64_t kBlock = 8192;        // rows of one partial sum over the batch; fixed, so that threads do not change the result

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
        : pool_(pool), groups_(num_groups), values_(values), weights_(class_weights), baseline_(baseline), scale_(scale),
          ddof_(ddof), eps_(eps) {}

    bool needs_moments() const {
        const bool reads_pool = baseline_ == Baseline::pool || baseline_ == Baseline::leave_one_out || scale_ == Scale::pool;
        return baseline_ == Baseline::group || scale_ == Scale::group || (reads_pool && !pool_);
    }

    bool needs_squares() const { return scale_ == Scale::group || (scale_ == Scale::pool && !pool_); }

    void set_batch(const Moments& m) {
        batch_ = divisor(static_cast<double>(m.count), m.m2(), m.square != 0, ddof_, eps_);
    }

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
        for (int64_t b = begin; b < end; ++b)
            partial[b] = moments_of(rewards + b * kBlock, std::min(kBlock, rows - b * kBlock), shift);
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

int64_t largest(const int64_t* ids, int64_t rows, int num_threads) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    std::vector<int64_t> partial(static_cast<std::size_t>(blocks));
    parallel_for(blocks, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            int64_t m = -1;
            for (int64_t i = b * kBlock, stop = std::min(i + kBlock, rows); i < stop; ++i) m = std::max(m, ids[i]);
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

// One thread adds up: out-of-order execution already overlaps the misses (1 ns a row while the table fits L2, 2.3 ns with 512k
// groups), and splitting either the groups or the rows over threads costs as much as it saves. False where a group is out of range.
template <class Slot>
bool add_up(const float* rewards, const int64_t* ids, int64_t rows, int64_t groups, Slot* slots) {
    for (int64_t i = 0; i < rows; ++i) {
        if (static_cast<std::uint64_t>(ids[i]) >= static_cast<std::uint64_t>(groups)) return false;
        slots[ids[i]].add(rewards[i]);
    }
    return true;
}

template <class Slot>
bool any_rows(const Rule& rule, const float* rewards, const int64_t* ids, int64_t rows, int64_t groups, float* out,
              int num_threads) {
    std::vector<Slot> slots(static_cast<std::size_t>(groups));
    if (rule.needs_moments() && !add_up(rewards, ids, rows, groups, slots.data())) return false;
    parallel_for(groups, groups, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) slots[g].settle(rule(g, slots[g].moments()));
    });
    std::atomic<bool> valid{true};
    parallel_for(rows, rows, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            if (static_cast<std::uint64_t>(ids[i]) >= static_cast<std::uint64_t>(groups)) {
                valid.store(false, std::memory_order_relaxed);
                return;
            }
            out[i] = rule.advantage(rewards[i], ids[i], slots[ids[i]].settled());
        }
    });
    return valid.load();
}

}  // namespace

int64_t group_advantages(const float* rewards, const int64_t* group_of, const int64_t* cu_seqlens, int64_t num_rows,
                         int64_t num_groups, const double* pool, const double* baseline_values, const double* class_weights,
                         int baseline, int scale, int64_t ddof, double eps, float* out, int num_threads) {
    if (cu_seqlens) {
        const int64_t wrong = first_wrong_offset(cu_seqlens, num_groups, num_rows);
        if (wrong >= 0) return wrong;
    }
    if (num_rows == 0) return -1;
    if (num_groups < 0) num_groups = largest(group_of, num_rows, num_threads) + 1;
    Rule rule(pool, num_groups, baseline_values, class_weights, static_cast<Baseline>(baseline), static_cast<Scale>(scale), ddof, eps);
    if (static_cast<Scale>(scale) == Scale::batch) rule.set_batch(batch_moments(rewards, num_rows, num_threads));

    if (cu_seqlens) {
        parallel_for(num_groups, num_rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; ++g)
                one_group(rule, rewards + cu_seqlens[g], cu_seqlens[g + 1] - cu_seqlens[g], g, out + cu_seqlens[g]);
        });
        return -1;
    }
    if (is_sorted(group_of, num_rows, num_threads)) {
        if (group_of[0] < 0 || group_of[num_rows - 1] >= num_groups) return first_outside(group_of, num_rows, num_groups);
        sorted_rows(rule, rewards, group_of, num_rows, out, num_threads);
        return -1;
    }
    const auto rows_in_any_order = rule.needs_squares() ? any_rows<ShiftedSums> : any_rows<Sums>;
    const bool valid = rows_in_any_order(rule, rewards, group_of, num_rows, num_groups, out, num_threads);
    return valid ? -1 : first_outside(group_of, num_rows, num_groups);
}

}  // namespace reinforce_ada::RA_ISA
