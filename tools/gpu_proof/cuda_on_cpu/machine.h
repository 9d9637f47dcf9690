// The machine that runs a kernel: its threads as fibers, and what each of them has read and written.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"
#include "stacks.h"

namespace cuda_on_cpu {

constexpr std::size_t kSharedBytes = 48 << 10;  // what every device has for a block without asking for more
constexpr std::size_t kSharedGap = 4096;        // between arrays: a wrong index falls into it

// -------------------- who has read and written what

// Every barrier that a whole block passes, and every start of a block or a kernel, begins an epoch; they are numbered through.
using Epoch = std::uint32_t;
constexpr Epoch kGuarded = 0xffffffffu;

// Of a warp's lanes in one epoch: bumped by __syncwarp.
using WarpEpoch = std::uint16_t;

// The last accesses of two neighbouring bytes, the smallest thing a kernel writes.
struct Cell {
    static constexpr std::uint16_t kSeveral = 0xffff, kSeveralOfWarp = 0x8000;  // as `reader`; kSeveralOfWarp + warp

    Epoch write_epoch, read_epoch, read_by_other_block;  // the last is the epoch in which that launch began
    std::uint16_t writer, reader;
    WarpEpoch write_warp_epoch, read_warp_epoch;
};

constexpr std::uintptr_t kPageBytes = 4096, kCellBytes = 2;
using Page = std::array<Cell, kPageBytes / kCellBytes>;

struct Range {
    std::uintptr_t begin, end;
};

struct SharedArray {
    const void* key;
    const char* name;
    std::uintptr_t begin;
    std::size_t bytes;
};

// -------------------- a block's threads

enum class State { ready, at_block_barrier, at_meeting, exited };

struct Meeting {
    unsigned mask;
    const void* value;
    void* result;
    std::size_t size;
    int source;
    bool vote;
    unsigned votes;
};

struct Fiber {
    Stack stack;
    State state;
    Site site;  // where it waits, or waited last
    Meeting meeting;
    WarpEpoch warp_epoch;
};

// Lanes that have come to a meeting wait for the others of its mask.
struct Warp {
    Site site;
    unsigned mask, waiting;
    unsigned absent;  // lanes that have exited, wait for the block, or never were
    WarpEpoch epoch;
};

class Machine {
  public:
    void run(unsigned grid_x, unsigned grid_y, unsigned threads, const std::function<void()>& thread);

    void block_barrier(Site site) {
        warps_[current_ / kLanes].absent |= 1u << current_ % kLanes;
        wait(State::at_block_barrier, site);
    }
    unsigned meet(Site site, const Meeting& meeting);
    void* shared_array(const void* key, const char* name, std::size_t bytes);

    template <bool kWrite>
    void access(std::uintptr_t address, std::size_t bytes, std::size_t alignment);
    void misaligned(bool write, std::uintptr_t address, std::size_t alignment);

    void guard(Range range);
    void clear_guards();

    std::mutex mutex;
    std::uint64_t seed = 0;

  private:
    void run_block(unsigned threads);
    void enter_block();
    void resume(unsigned thread);
    void wait(State state, Site site);
    [[noreturn]] void leave_thread();
    void complete_meeting(unsigned number);
    [[noreturn]] void fail_meeting(Site site, unsigned lanes);
    void release_block();
    std::string stuck() const;
    std::string describe(unsigned thread) const;
    [[noreturn]] void fail(const std::string& what);

    Cell* cells_of(std::uintptr_t address);
    template <bool kWrite>
    void note(Cell& cell, std::uintptr_t address, bool shared);
    [[noreturn]] void fail_access(bool write, std::uintptr_t address, const std::string& why);
    bool ordered(std::uint16_t thread, WarpEpoch warp_epoch) const;

    void begin_epoch();
    unsigned random(unsigned below);

    static void entry();

    Stacks stacks_;
    Stack scheduler_{};
    std::vector<Fiber> fibers_{kMaxThreads};
    std::vector<unsigned> ready_;
    unsigned threads_ = 0, current_ = 0, exited_ = 0;
    bool running_ = false;  // a fiber, not the scheduler
    std::string failure_;
    const std::function<void()>* thread_ = nullptr;
    std::uint64_t state_ = 1;

    std::array<Warp, kMaxThreads / kLanes> warps_{};
    Epoch epoch_ = 1, launch_begin_ = 1, block_begin_ = 1;

    std::vector<char> shared_ = std::vector<char>(kSharedBytes + 64 * kSharedGap);
    std::vector<SharedArray> arrays_;
    std::size_t shared_used_ = 0, shared_end_ = 0;

    std::unordered_map<std::uintptr_t, Page*> pages_;
    std::vector<std::unique_ptr<Page>> pool_;
    std::size_t pages_used_ = 0;
    std::array<std::pair<std::uintptr_t, Page*>, 64> recent_{};
    std::vector<Range> guards_;

#ifdef __SANITIZE_ADDRESS__
    const void* host_stack_ = nullptr;
    std::size_t host_stack_size_ = 0;
#endif

    friend Machine& machine();
};

Machine& machine();

}  // namespace cuda_on_cpu
