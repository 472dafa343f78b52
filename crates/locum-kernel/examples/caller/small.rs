//! Threads on stacks that are small parts of other memory, as goroutines and coroutines are.

use crate::bare::number;

/// How much of such a stack is below the stack pointer: less than a signal frame takes.
const BELOW: usize = 512;
/// What must stay as it is, below the stack and above it.
const AROUND: usize = 32 * 1024;
const PATTERN: u8 = 0x5a;

std::arch::global_asm!(
    "locum_call_on:",
    "push rbx",
    "mov rbx, rsp",
    "mov rsp, rdi",
    "mov rcx, rsi",
    "mov rax, [rcx]",
    "mov rdi, [rcx + 8]",
    "mov rsi, [rcx + 16]",
    "mov rdx, [rcx + 24]",
    "mov r10, [rcx + 32]",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "syscall",
    "mov rsp, rbx",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn locum_call_on(stack: *mut u8, call: *const [u64; 5]) -> i64;
}

/// A small stack and what is around it.
pub(crate) struct Small(Vec<u8>);

impl Small {
    pub(crate) fn new() -> Self {
        Self(vec![PATTERN; 2 * AROUND + BELOW])
    }

    /// One system call, made on this stack.
    pub(crate) fn call(&mut self, nr: i64, args: [u64; 4]) -> i64 {
        let call = [nr.cast_unsigned(), args[0], args[1], args[2], args[3]];
        let stack = &raw mut self.0[AROUND + BELOW];
        // SAFETY: the function leaves the stack on which it was called as it was, and uses none of the other; the kernel is told
        // to write to nothing but what the caller lets it.
        unsafe { locum_call_on(stack, &raw const call) }
    }

    /// Whether something was written where nothing of this stack is.
    pub(crate) fn is_damaged(&self) -> bool {
        let around = self.0[..AROUND].iter().chain(&self.0[AROUND + BELOW..]);
        around.copied().any(|byte| byte != PATTERN)
    }
}

/// Waits on a small stack until the standard input ends.
pub(crate) fn wait(small: &mut Small) {
    let mut byte = 0_u8;
    small.call(libc::SYS_read, [number(libc::STDIN_FILENO), &raw mut byte as u64, 1, 0]);
}
