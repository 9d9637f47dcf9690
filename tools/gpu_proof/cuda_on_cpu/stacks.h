// Stacks for the threads of a block, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

constexpr unsigned kMaxThreads = 1024;

#ifdef __x86_64__
using Stack = void*;  // the stack pointer; what a call must preserve lies on the stack itself
#else
using Stack = ucontext_t;
#endif

void switch_stack(Stack& from, Stack& to);

// Makes the switch to `stack` a call of `entry`.
void prepare(Stack& stack, char* memory, std::size_t size, void (*entry)());

// One stack for each thread of a block, kept from launch to launch, with a page below it that nobody may touch.
class Stacks {
  public:
#ifdef __SANITIZE_ADDRESS__
    static constexpr std::size_t kSize = 512 << 10;
#else
    static constexpr std::size_t kSize = 64 << 10;
#endif

    Stacks();

    char* of(unsigned thread) const { return begin_ + thread * kSize + page_; }
    std::size_t size() const { return kSize - page_; }
    bool contain(std::uintptr_t address) const { return address - reinterpret_cast<std::uintptr_t>(begin_) < kMaxThreads * kSize; }

  private:
    char* begin_;
    std::size_t page_;
};

}  // namespace cuda_on_cpu
