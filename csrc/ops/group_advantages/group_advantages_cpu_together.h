// Groups whose rows lie together: offsets say where, or group numbers that never descend.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/parallel.h"
#include "ops/group_advantages/group_advantages_cpu_rule.h"

namespace reinforce_ada::RA_ISA {
namespace {

// Groups whose rows lie together, so many at a time: the divisions and roots of a register take as long as those of two groups.
template <bool kSquares>
class Together {
  public:
    // Advantages are written a register at a time, past the end of their group too but not past `limit`: up to there the groups that
    // follow overwrite them.
    Together(const Rule& rule, const Rows& rows, int64_t limit) : rule_(rule), rows_(rows), limit_(limit) {}

    RA_METHOD void add(int64_t g, int64_t begin, int64_t stop) {
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
    RA_METHOD void write(int64_t g, int64_t begin, int64_t stop, const Affine& a) {
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

}  // namespace
}  // namespace reinforce_ada::RA_ISA
