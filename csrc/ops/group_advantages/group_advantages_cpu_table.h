// Rows in any order, by a table with an entry a group.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "ops/group_advantages/group_advantages_cpu_rule.h"

namespace reinforce_ada::RA_ISA {
namespace {

constexpr int64_t kNear = int64_t{1} << 19;  // bytes of a table that stays in the L2 cache
constexpr int64_t kAhead = 32;               // rows a table is prefetched ahead: as many misses as a core can have in flight
typedef double Two __attribute__((vector_size(16)));

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
    static RA_METHOD void add(double* entry, double first, double second) {
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
    RA_METHOD void each(int64_t begin, int64_t end, const Body& body) {
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

// Ranks in place of group numbers, which name the same groups; returns how many there are.
__attribute__((noinline)) int64_t rank(const int64_t* ids, int64_t count, std::vector<int64_t>& ranks) {
    std::vector<int64_t> numbers(ids, ids + count);
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    ranks.resize(static_cast<std::size_t>(count));
    std::transform(ids, ids + count, ranks.begin(),
                   [&](int64_t id) { return std::lower_bound(numbers.begin(), numbers.end(), id) - numbers.begin(); });
    return static_cast<int64_t>(numbers.size());
}

// The same where num_groups may be -1.
int64_t rows_in_any_order(const Rule& rule, const Rows& rows, const int64_t* ids, int64_t num_groups, int num_threads) {
    if (num_groups >= 0) return any_rows(rule, rows, ids, num_groups, false, num_threads);
    // As many groups as rows is room enough for nearly everybody, and in fresh pages it costs nothing before it is touched.
    const bool roomy = rows.count * 16 >= static_cast<int64_t>(kHugePage);
    if (roomy && any_rows(rule, rows, ids, rows.count, false, num_threads) < 0) return -1;
    const std::uint64_t most = largest(ids, rows.count);
    if (static_cast<int64_t>(most) < 0) return first_outside(ids, rows.count, std::numeric_limits<int64_t>::max());
    // A table for numbers like hashes would not fit any memory.
    const bool like_hashes = static_cast<int64_t>(most) >= 4 * rows.count + kFewGroups;
    std::vector<int64_t> ranks;
    const int64_t room = like_hashes ? rank(ids, rows.count, ranks) : static_cast<int64_t>(most) + 1;
    return any_rows(rule, rows, like_hashes ? ranks.data() : ids, room, true, num_threads);
}

}  // namespace
}  // namespace reinforce_ada::RA_ISA
