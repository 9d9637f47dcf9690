// What threads read and write, checked against what others did; the callbacks of the compiler come here.
#include <algorithm>
#include <cstring>

#include "machine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

Machine& machine() {
    static Machine* const only = new Machine;  // lives as long as the process: fibers hold no way to end
    return *only;
}

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

}  // namespace cuda_on_cpu

using cuda_on_cpu::machine;

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
