#include "cuda_on_cpu.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

CudaIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

using cuda_on_cpu::Site;

constexpr unsigned kLanes = cuda_on_cpu::kLanes, kMaxThreads = 1024;
constexpr std::size_t kSharedBytes = 48 << 10;  // what every device has for a block without asking for more
constexpr std::size_t kSharedGap = 4096;        // between arrays: a wrong index falls into it

// -------------------- a switch from one stack to another

#ifdef __x86_64__

using Stack = void*;  // the stack pointer; what a call must preserve lies on the stack itself

extern "C" void cuda_on_cpu_switch(Stack* from, Stack to);
asm(R"(
.pushsection .text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
.popsection
)");

void switch_stack(Stack& from, Stack& to) { cuda_on_cpu_switch(&from, to); }

void prepare(Stack& stack, char* memory, std::size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(memory + size) - 1;  // entered like a called function: 8 past a multiple of 16
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack = top - 6;
}

#else

using Stack = ucontext_t;

void switch_stack(Stack& from, Stack& to) { swapcontext(&from, &to); }

void prepare(Stack& stack, char* memory, std::size_t size, void (*entry)()) {
    getcontext(&stack);
    stack.uc_stack.ss_sp = memory;
    stack.uc_stack.ss_size = size;
    stack.uc_link = nullptr;
    makecontext(&stack, entry, 0);
}

#endif

// One stack for each thread of a block, kept from launch to launch, with a page below it that nobody may touch.
class Stacks {
  public:
#ifdef __SANITIZE_ADDRESS__
    static constexpr std::size_t kSize = 512 << 10;
#else
    static constexpr std::size_t kSize = 64 << 10;
#endif

    Stacks() : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
        void* memory = mmap(nullptr, kMaxThreads * kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
        begin_ = static_cast<char*>(memory);
        for (unsigned thread = 0; thread < kMaxThreads; ++thread) mprotect(begin_ + thread * kSize, page_, PROT_NONE);
    }

    char* of(unsigned thread) const { return begin_ + thread * kSize + page_; }
    std::size_t size() const { return kSize - page_; }
    bool contain(std::uintptr_t address) const { return address - reinterpret_cast<std::uintptr_t>(begin_) < kMaxThreads * kSize; }

  private:
    char* begin_;
    std::size_t page_;
};

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

std::string text(const Site& site) {
    const std::string file = site.file;
    return std::string(site.what) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line) + ")";
}

std::string doing(const Fiber& fiber) { return fiber.state == State::exited ? " has exited" : " waits at " + text(fiber.site); }

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

Machine& machine() {
    static Machine* const only = new Machine;  // lives as long as the process: fibers hold no way to end
    return *only;
}

// -------------------- running

void Machine::run(unsigned grid_x, unsigned grid_y, unsigned threads, const std::function<void()>& thread) {
    if (threads == 0 || threads > kMaxThreads) throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
    const std::lock_guard<std::mutex> lock(mutex);
    thread_ = &thread;
    state_ = (seed + 1) * 0x9e3779b97f4a7c15u;
    gridDim = {grid_x, grid_y};
    blockDim = {threads, 1};
    begin_epoch();
    launch_begin_ = epoch_;
    pages_.clear();
    recent_.fill({});
    pages_used_ = 0;
    for (const Range& range : guards_)
        for (std::uintptr_t address = range.begin + range.begin % kCellBytes; address + 1 < range.end; address += kCellBytes)
            cells_of(address)->write_epoch = kGuarded;

    std::vector<std::uint64_t> order(static_cast<std::size_t>(grid_x) * grid_y);
    for (std::size_t i = 0; i < order.size(); ++i) {
        order[i] = i;
        std::swap(order[i], order[random(static_cast<unsigned>(i + 1))]);
    }
    for (const std::uint64_t block : order) {
        blockIdx = {static_cast<unsigned>(block % grid_x), static_cast<unsigned>(block / grid_x)};
        run_block(threads);
        if (!failure_.empty()) throw std::runtime_error(std::exchange(failure_, {}));
    }
}

void Machine::run_block(unsigned threads) {
    threads_ = threads;
    exited_ = 0;
    enter_block();
    ready_.clear();
    for (unsigned thread = 0; thread < threads; ++thread) {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stacks_.of(thread), stacks_.size());  // what an abandoned kernel left
#endif
        prepare(fibers_[thread].stack, stacks_.of(thread), stacks_.size(), &Machine::entry);
        fibers_[thread].state = State::ready;
        fibers_[thread].site = {"", 0, ""};
        ready_.push_back(thread);
    }
    while (failure_.empty() && exited_ < threads_) {
        if (ready_.empty()) {
            release_block();
            continue;
        }
        std::swap(ready_[random(static_cast<unsigned>(ready_.size()))], ready_.back());
        const unsigned thread = ready_.back();
        ready_.pop_back();
        resume(thread);
    }
}

void Machine::enter_block() {
    begin_epoch();
    block_begin_ = epoch_;
    arrays_.clear();
    shared_used_ = 0;
    shared_end_ = kSharedGap;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(shared_.data(), shared_.size());
    std::fill(shared_.begin(), shared_.end(), '\xff');
    __asan_poison_memory_region(shared_.data(), shared_.size());
#endif
}

void Machine::resume(unsigned thread) {
    current_ = thread;
    threadIdx = {thread, 0};
    running_ = true;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stacks_.of(thread), stacks_.size());
    switch_stack(scheduler_, fibers_[thread].stack);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    switch_stack(scheduler_, fibers_[thread].stack);
#endif
    running_ = false;
}

void Machine::entry() {
    Machine& self = machine();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &self.host_stack_, &self.host_stack_size_);
#endif
    (*self.thread_)();
    self.fibers_[self.current_].state = State::exited;
    self.warps_[self.current_ / kLanes].absent |= 1u << self.current_ % kLanes;
    ++self.exited_;
    self.leave_thread();
}

// Back to the scheduler for good.
void Machine::leave_thread() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(nullptr, host_stack_, host_stack_size_);
#endif
    switch_stack(fibers_[current_].stack, scheduler_);
    __builtin_unreachable();
}

void Machine::wait(State state, Site site) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    fiber.site = site;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, host_stack_, host_stack_size_);
    switch_stack(fiber.stack, scheduler_);
    __sanitizer_finish_switch_fiber(fake_stack, &host_stack_, &host_stack_size_);
#else
    switch_stack(fiber.stack, scheduler_);
#endif
}

unsigned Machine::meet(Site site, const Meeting& meeting) {
    const unsigned number = current_ / kLanes, own = 1u << current_ % kLanes;
    Warp& warp = warps_[number];
    if (!(meeting.mask & own)) fail("its own lane is not in the mask of " + text(site));
    if (!(meeting.mask >> meeting.source & 1)) fail("reads a lane that is not in the mask of " + text(site));
    if (meeting.mask & warp.absent) fail_meeting(site, meeting.mask & warp.absent);
    if (warp.waiting == 0) {
        warp.site = site;
        warp.mask = meeting.mask;
    }
    if (warp.site.line != site.line || warp.site.what != site.what || warp.mask != meeting.mask) fail_meeting(site, warp.waiting);
    warp.waiting |= own;
    fibers_[current_].meeting = meeting;
    if (warp.waiting != meeting.mask) {
        wait(State::at_meeting, site);
    } else {
        fibers_[current_].site = site;
        complete_meeting(number);
        wait(State::ready, site);
    }
    return fibers_[current_].meeting.votes;
}

void Machine::complete_meeting(unsigned number) {
    Warp& warp = warps_[number];
    Fiber* const lanes = &fibers_[number * kLanes];
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
        if (warp.mask >> lane & 1) votes |= static_cast<unsigned>(lanes[lane].meeting.vote) << lane;
    const bool orders_memory = std::strcmp(warp.site.what, "__syncwarp") == 0;
    warp.epoch += orders_memory;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (!(warp.mask >> lane & 1)) continue;
        Meeting& meeting = lanes[lane].meeting;
        if (meeting.size > 0) std::memcpy(meeting.result, lanes[meeting.source].meeting.value, meeting.size);
        meeting.votes = votes;
        if (orders_memory) lanes[lane].warp_epoch = warp.epoch;
        lanes[lane].state = State::ready;
        ready_.push_back(number * kLanes + lane);
    }
    warp.waiting = 0;
}

void Machine::fail_meeting(Site site, unsigned lanes) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(lanes)), thread = current_ / kLanes * kLanes + lane;
    const std::string does = thread >= threads_ ? " is past the end of the block" : doing(fibers_[thread]);
    fail("at " + text(site) + ": lane " + std::to_string(lane) + " of the mask" + does);
}

// Every thread waits: at one and the same barrier, or something is wrong.
void Machine::release_block() {
    failure_ = stuck();
    if (!failure_.empty()) return;
    begin_epoch();
    for (unsigned thread = 0; thread < threads_; ++thread) {
        fibers_[thread].state = State::ready;
        ready_.push_back(thread);
    }
}

std::string Machine::stuck() const {
    unsigned first = 0;
    while (fibers_[first].state == State::exited) ++first;
    const Fiber& a = fibers_[first];
    for (unsigned thread = 0; thread < threads_; ++thread) {
        const Fiber& b = fibers_[thread];
        if (a.state != b.state || a.site.line != b.site.line || std::strcmp(a.site.file, b.site.file) != 0)
            return "the block's threads part: " + describe(first) + ", " + describe(thread);
    }
    return a.state == State::at_block_barrier ? "" : "for ever " + describe(first);
}

std::string Machine::describe(unsigned thread) const { return "thread " + std::to_string(thread) + doing(fibers_[thread]); }

void Machine::fail(const std::string& what) {
    failure_ = "thread " + std::to_string(threadIdx.x) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
               "): " + what;
    const Site& last = fibers_[current_].site;
    if (last.line > 0) failure_ += "; its last synchronisation was " + text(last);
    leave_thread();
}

void Machine::begin_epoch() {
    ++epoch_;
    for (unsigned warp = 0; warp * kLanes < threads_; ++warp) {
        const unsigned lanes = threads_ - warp * kLanes;
        warps_[warp] = {{}, 0, 0, lanes < kLanes ? ~0u << lanes : 0, 0};
    }
    for (unsigned thread = 0; thread < threads_; ++thread) fibers_[thread].warp_epoch = 0;
}

unsigned Machine::random(unsigned below) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 32) * below >> 32);
}

// -------------------- memory

void* Machine::shared_array(const void* key, const char* name, std::size_t bytes) {
    for (const SharedArray& array : arrays_)
        if (array.key == key) return reinterpret_cast<void*>(array.begin);
    shared_used_ += bytes;
    if (shared_used_ > kSharedBytes || arrays_.size() == 64) fail("more shared memory than 48 KB with " + std::string(name));
    char* begin = shared_.data() + (kSharedGap - reinterpret_cast<std::uintptr_t>(shared_.data()) % kSharedGap) + shared_end_;
    shared_end_ += (bytes / kSharedGap + 2) * kSharedGap;
    arrays_.push_back({key, name, reinterpret_cast<std::uintptr_t>(begin), bytes});
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(begin, bytes);
#else
    std::memset(begin, 0xff, bytes);  // NaN in every format
#endif
    return begin;
}

Cell* Machine::cells_of(std::uintptr_t address) {
    const std::uintptr_t number = address / kPageBytes;
    auto& recent = recent_[number % recent_.size()];
    if (recent.second == nullptr || recent.first != number) {
        Page*& page = pages_[number];
        if (page == nullptr) {
            // Not cleared when it was another page before: epochs of earlier launches say that nothing happened in this one.
            if (pages_used_ == pool_.size()) pool_.push_back(std::make_unique<Page>());
            page = pool_[pages_used_++].get();
            for (Cell& cell : *page)
                if (cell.write_epoch == kGuarded) cell.write_epoch = 0;
        }
        recent = {number, page};
    }
    return &(*recent.second)[address % kPageBytes / kCellBytes];
}

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // of this module, from the linker

template <bool kWrite>
void Machine::access(std::uintptr_t address, std::size_t bytes, std::size_t alignment) {
    if (!running_ || stacks_.contain(address)) return;
    if (address - reinterpret_cast<std::uintptr_t>(&__ehdr_start) < static_cast<std::size_t>(&_end - &__ehdr_start)) return;
    const bool shared = address - reinterpret_cast<std::uintptr_t>(shared_.data()) < shared_.size();
    if (shared) {
        const auto inside = [&](const SharedArray& a) { return a.begin <= address && address + bytes <= a.begin + a.bytes; };
        if (std::none_of(arrays_.begin(), arrays_.end(), inside)) fail_access(kWrite, address, "outside of every array of shared memory");
    }
    if (address % alignment != 0) misaligned(kWrite, address, alignment);
    for (std::uintptr_t end = address + bytes; address < end; address = (address / kCellBytes + 1) * kCellBytes)
        note<kWrite>(*cells_of(address), address, shared);
}

void Machine::misaligned(bool write, std::uintptr_t address, std::size_t alignment) {
    if (running_) fail_access(write, address, "not a multiple of " + std::to_string(alignment));
}

// Whether that thread's access came before a barrier that the current thread has passed as well; of accesses in one epoch.
bool Machine::ordered(std::uint16_t thread, WarpEpoch warp_epoch) const {
    return thread == current_ || (thread / kLanes == current_ / kLanes && warp_epoch != fibers_[current_].warp_epoch);
}

template <bool kWrite>
void Machine::note(Cell& cell, std::uintptr_t address, bool shared) {
    const auto me = static_cast<std::uint16_t>(current_);
    const WarpEpoch warp_epoch = fibers_[current_].warp_epoch;
    if (cell.write_epoch == kGuarded) fail_access(kWrite, address, "outside of every tensor");
    const Epoch first = shared ? block_begin_ : launch_begin_;
    const bool written = cell.write_epoch >= first, read = cell.read_epoch >= first;
    if (written && cell.write_epoch < block_begin_) fail_access(kWrite, address, "which another block writes");
    if (written && cell.write_epoch == epoch_ && !ordered(cell.writer, cell.write_warp_epoch))
        fail_access(kWrite, address, "which thread " + std::to_string(cell.writer) + " has written with no barrier since");
    if constexpr (kWrite) {
        if (!shared && (cell.read_by_other_block == launch_begin_ || (read && cell.read_epoch < block_begin_)))
            fail_access(kWrite, address, "which another block reads");
        if (read && cell.read_epoch == epoch_) {
            const bool several = cell.reader == Cell::kSeveral;
            const bool one_warp = cell.reader >= Cell::kSeveralOfWarp;
            const auto warp = static_cast<std::uint16_t>(cell.reader - Cell::kSeveralOfWarp);
            const bool fine = several    ? false
                              : one_warp ? warp == me / kLanes && cell.read_warp_epoch != warp_epoch
                                         : ordered(cell.reader, cell.read_warp_epoch);
            if (!fine) fail_access(kWrite, address, "which another thread has read with no barrier since");
        }
        cell.write_epoch = epoch_;
        cell.writer = me;
        cell.write_warp_epoch = warp_epoch;
    } else {
        if (shared && !written) fail_access(kWrite, address, "which nobody has written");
        if (!shared && read && cell.read_epoch < block_begin_) cell.read_by_other_block = launch_begin_;
        const auto of_warp = static_cast<std::uint16_t>(Cell::kSeveralOfWarp + me / kLanes);
        const bool same_warp = cell.reader == of_warp || (cell.reader < kMaxThreads && cell.reader / kLanes == me / kLanes);
        if (!read || cell.read_epoch != epoch_ || (same_warp && cell.read_warp_epoch != warp_epoch))
            cell.reader = me;  // what was read before is behind a barrier for whoever the new reader is not in a race with
        else if (cell.reader != me)
            cell.reader = same_warp ? of_warp : Cell::kSeveral;
        cell.read_epoch = epoch_;
        cell.read_warp_epoch = warp_epoch;
    }
}

void Machine::fail_access(bool write, std::uintptr_t address, const std::string& why) {
    std::string where = "an address";
    for (const SharedArray& array : arrays_)
        if (array.begin <= address && address < array.begin + array.bytes)
            where = "byte " + std::to_string(address - array.begin) + " of " + array.name;
    fail((write ? "writes " : "reads ") + where + ", " + why);
}

void Machine::guard(Range range) {
    guards_.push_back(range);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(reinterpret_cast<void*>(range.begin), range.end - range.begin);
#endif
}

void Machine::clear_guards() {
#ifdef __SANITIZE_ADDRESS__
    for (const Range& range : guards_) __asan_unpoison_memory_region(reinterpret_cast<void*>(range.begin), range.end - range.begin);
#endif
    guards_.clear();
}

}  // namespace

// -------------------- for kernels

namespace cuda_on_cpu {

void block_barrier(Site site) { machine().block_barrier(site); }

unsigned meet(Site site, unsigned mask, const void* value, void* result, std::size_t size, int source, bool vote) {
    return machine().meet(site, {mask, value, result, size, source, vote, 0});
}

void* shared_array(const void* key, const char* name, std::size_t bytes) { return machine().shared_array(key, name, bytes); }

}  // namespace cuda_on_cpu

void reinforce_ada::run_on_cpu(unsigned grid_x, unsigned grid_y, unsigned threads, const std::function<void()>& thread) {
    machine().run(grid_x, grid_y, threads, thread);
}

// -------------------- for tests

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_ON_CPU_EXPORT void cuda_on_cpu_seed(std::uint64_t seed) { machine().seed = seed; }
CUDA_ON_CPU_EXPORT void cuda_on_cpu_guard(std::uintptr_t begin, std::uintptr_t end) { machine().guard({begin, end}); }
CUDA_ON_CPU_EXPORT void cuda_on_cpu_clear_guards() { machine().clear_guards(); }

// -------------------- what -fsanitize=thread calls

#define CUDA_ON_CPU_ACCESS(size)                                                                                             \
    extern "C" void __tsan_read##size(void* p) { machine().access<false>(reinterpret_cast<std::uintptr_t>(p), size, size); } \
    extern "C" void __tsan_write##size(void* p) { machine().access<true>(reinterpret_cast<std::uintptr_t>(p), size, size); }
CUDA_ON_CPU_ACCESS(1)
CUDA_ON_CPU_ACCESS(2)
CUDA_ON_CPU_ACCESS(4)
CUDA_ON_CPU_ACCESS(8)
CUDA_ON_CPU_ACCESS(16)

extern "C" void __tsan_read_range(void* p, std::size_t n) { machine().access<false>(reinterpret_cast<std::uintptr_t>(p), n, 1); }
extern "C" void __tsan_write_range(void* p, std::size_t n) { machine().access<true>(reinterpret_cast<std::uintptr_t>(p), n, 1); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// -------------------- what -fsanitize=alignment calls

// The compiler may make two accesses or a range of one, of which the callbacks above do not know how wide it was in the source.
struct TypeMismatch {
    const char* file;
    std::uint32_t line, column;
    const void* type;
    std::uint8_t log_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch* found, std::uintptr_t address) {
    machine().misaligned(found->kind == 1, address, std::size_t{1} << found->log_alignment);
}
