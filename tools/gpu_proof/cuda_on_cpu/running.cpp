// Blocks and their threads in random order, and where threads wait for each other.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "machine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

namespace {

std::string text(const Site& site) {
    const std::string file = site.file;
    return std::string(site.what) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line) + ")";
}

std::string doing(const Fiber& fiber) { return fiber.state == State::exited ? " has exited" : " waits at " + text(fiber.site); }

}  // namespace

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

}  // namespace cuda_on_cpu
