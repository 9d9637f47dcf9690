#include "stacks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

namespace cuda_on_cpu {

#ifdef __x86_64__

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

void switch_stack(Stack& from, Stack& to) { swapcontext(&from, &to); }

void prepare(Stack& stack, char* memory, std::size_t size, void (*entry)()) {
    getcontext(&stack);
    stack.uc_stack.ss_sp = memory;
    stack.uc_stack.ss_size = size;
    stack.uc_link = nullptr;
    makecontext(&stack, entry, 0);
}

#endif

Stacks::Stacks() : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, kMaxThreads * kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
    begin_ = static_cast<char*>(memory);
    for (unsigned thread = 0; thread < kMaxThreads; ++thread) mprotect(begin_ + thread * kSize, page_, PROT_NONE);
}

}  // namespace cuda_on_cpu
