//! A caller that opens a symbolic link by handle, O_PATH, over and again, and looks each time whether anything of it is not as
//! it was: registers, vector unit, red zone, signal mask, alternate stack, descriptors.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use locum_kernel::attach::Refusal;
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::process::Thread;
use rustix::fs::OFlags;
use rustix::io::FdFlags;

use crate::bare::{AT_FDCWD, Ground, Pages, told};
use crate::small::Small;

const THREADS: usize = 4;

/// What goes into one call, and what it left.
#[repr(C)]
struct Call {
    nr: u64,
    args: [u64; 6],
    /// Whether the upper halves of the vector registers are there.
    wide: u64,
    put: [[u64; 4]; 16],
    found: [[u64; 4]; 16],
    /// The word that comes with each general register and each word of the red zone.
    pattern: u64,
    damaged: u64,
    floating: [u32; 2],
    /// What is on the x87's stack.
    real: [f64; 2],
}

std::arch::global_asm!(
    ".macro locum_vectors op_wide, op, place, load",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    ".if \\load",
    "\\op_wide ymm\\n, [rcx + \\place + 32 * \\n]",
    ".else",
    "\\op_wide [rcx + \\place + 32 * \\n], ymm\\n",
    ".endif",
    ".endr",
    ".endm",
    "locum_checked_call:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "mov rcx, rdi",
    "cmp qword ptr [rcx + {wide}], 0",
    "je 2f",
    "locum_vectors vmovdqu, movdqu, {put}, 1",
    "2:",
    "fld qword ptr [rcx + {real}]",
    // The red zone, in which nothing but this may write.
    "mov rax, [rcx + {pattern}]",
    "mov r11, -128",
    "3:",
    "mov [rsp + r11], rax",
    "inc rax",
    "add r11, 8",
    "jnz 3b",
    "lea rbx, [rax + 1]",
    "lea rbp, [rax + 2]",
    "lea r12, [rax + 3]",
    "lea r13, [rax + 4]",
    "lea r14, [rax + 5]",
    "lea r15, [rax + 6]",
    "mov rdi, [rcx + {args}]",
    "mov rsi, [rcx + {args} + 8]",
    "mov rdx, [rcx + {args} + 16]",
    "mov r10, [rcx + {args} + 24]",
    "mov r8, [rcx + {args} + 32]",
    "mov r9, [rcx + {args} + 40]",
    "mov rax, [rcx + {nr}]",
    "syscall",
    // Only rcx and r11 are the kernel's to change.
    "mov rcx, [rsp]",
    "fstp qword ptr [rcx + {real} + 8]",
    "cmp rdi, [rcx + {args}]",
    "jne 9f",
    "cmp rsi, [rcx + {args} + 8]",
    "jne 9f",
    "cmp rdx, [rcx + {args} + 16]",
    "jne 9f",
    "cmp r10, [rcx + {args} + 24]",
    "jne 9f",
    "cmp r8, [rcx + {args} + 32]",
    "jne 9f",
    "cmp r9, [rcx + {args} + 40]",
    "jne 9f",
    "mov rdx, [rcx + {pattern}]",
    "mov r11, -128",
    "4:",
    "cmp [rsp + r11], rdx",
    "jne 9f",
    "inc rdx",
    "add r11, 8",
    "jnz 4b",
    "sub rbx, 1",
    "cmp rbx, rdx",
    "jne 9f",
    "sub rbp, 2",
    "cmp rbp, rdx",
    "jne 9f",
    "sub r12, 3",
    "cmp r12, rdx",
    "jne 9f",
    "sub r13, 4",
    "cmp r13, rdx",
    "jne 9f",
    "sub r14, 5",
    "cmp r14, rdx",
    "jne 9f",
    "sub r15, 6",
    "cmp r15, rdx",
    "jne 9f",
    "cmp qword ptr [rcx + {wide}], 0",
    "je 5f",
    "locum_vectors vmovdqu, movdqu, {found}, 0",
    "vzeroupper",
    "5:",
    "stmxcsr [rcx + {floating}]",
    "fnstcw [rcx + {floating} + 4]",
    "jmp 6f",
    "9:",
    "mov qword ptr [rcx + {damaged}], 1",
    "6:",
    "pop rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    nr = const std::mem::offset_of!(Call, nr),
    args = const std::mem::offset_of!(Call, args),
    wide = const std::mem::offset_of!(Call, wide),
    put = const std::mem::offset_of!(Call, put),
    found = const std::mem::offset_of!(Call, found),
    pattern = const std::mem::offset_of!(Call, pattern),
    damaged = const std::mem::offset_of!(Call, damaged),
    floating = const std::mem::offset_of!(Call, floating),
    real = const std::mem::offset_of!(Call, real),
);

unsafe extern "C" {
    fn locum_checked_call(call: *mut Call) -> i64;
}

impl Call {
    /// With what tells this round from every other in all that a call must leave as it is.
    fn new(nr: i64, args: [u64; 6], round: u64) -> Self {
        let word = |register: usize, word: usize| {
            round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (register * 4 + word) as u64
        };
        Self {
            nr: nr.cast_unsigned(),
            args,
            wide: std::arch::is_x86_feature_detected!("avx").into(),
            put: std::array::from_fn(|register| std::array::from_fn(|index| word(register, index))),
            found: [[0; 4]; 16],
            pattern: round << 8,
            damaged: 0,
            floating: [0; 2],
            real: [round as f64 + 0.5, 0.0],
        }
    }

    /// # Safety
    /// The kernel writes where the call says.
    unsafe fn make(&mut self) -> i64 {
        // SAFETY: the function keeps to the calling convention, and the caller answers for the rest.
        unsafe { locum_checked_call(self) }
    }

    fn is_damaged(&self) -> bool {
        let vectors_are_good = self.wide == 0 || self.put == self.found;
        // The values with which a program starts.
        let floating_is_good = self.floating[0] & !0x3f == 0x1f80 && self.floating[1] & 0xffff == 0x37f;
        let real_is_good = self.real[0].to_bits() == self.real[1].to_bits();
        self.damaged != 0 || !vectors_are_good || !floating_is_good || !real_is_good
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

#[derive(Default)]
struct Seen {
    right: u64,
    wrong: u64,
    failed: u64,
    damaged: u64,
}

/// For so many seconds, with a signal so often, in microseconds (0: never).
pub(crate) fn run(ground: &Ground, seconds: u64, signal_every: u64) {
    std::os::unix::fs::symlink("/nowhere", ground.path("intact")).unwrap();
    let handle = ground.handle(&ground.path("intact"));
    let before = descriptors();
    if signal_every > 0 {
        handle_alarms();
        set_timer(signal_every);
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let seen: Vec<Seen> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                scope.spawn({
                    let handle = &handle;
                    move || look(ground, handle, index as u64, end)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    if signal_every > 0 {
        set_timer(0);
    }
    let sum = |of: fn(&Seen) -> u64| seen.iter().map(of).sum::<u64>();
    println!(
        "{{\"right\": {}, \"wrong\": {}, \"failed\": {}, \"damaged\": {}, \"leaked\": {}, \"signals\": {}}}",
        sum(|seen| seen.right),
        sum(|seen| seen.wrong),
        sum(|seen| seen.failed),
        sum(|seen| seen.damaged),
        descriptors().saturating_sub(before),
        SIGNALS.load(Ordering::Relaxed),
    );
}

/// Looks at itself while it is attached from outside, over and again, with a filter that hands over what it never calls. Closes its own
/// copies of listeners for each line that comes in, and says how many there were; at the end, what it saw.
pub(crate) fn while_attached(signal_every: u64) {
    let before = descriptors();
    if signal_every > 0 {
        handle_alarms();
        set_timer(signal_every);
    }
    let (done, damaged, calls) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for index in 0..THREADS as u64 {
            let (done, damaged, calls) = (&done, &damaged, &calls);
            scope.spawn(move || {
                let stack = vec![0_u8; 64 * 1024];
                let own = own_state(&stack, index);
                let mut round = index << 32;
                // The surgeon is not to wait for this.
                crate::bare::call(libc::SYS_setpriority, [libc::PRIO_PROCESS.into(), 0, 19, 0, 0, 0]);
                while !done.load(Ordering::Relaxed) {
                    round += 1;
                    let mut call = Call::new(libc::SYS_getppid, [round, !round, 1, 2, 3, round << 7], round);
                    // SAFETY: getppid(2) writes nothing.
                    let result = unsafe { call.make() };
                    if result <= 0 || call.is_damaged() || !is_own_state(&own) {
                        damaged.fetch_add(1, Ordering::Relaxed);
                    }
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in std::io::stdin().lines() {
            println!("{}", close_listeners());
        }
        done.store(true, Ordering::Relaxed);
    });
    if signal_every > 0 {
        set_timer(0);
    }
    println!(
        "{{\"damaged\": {damaged:?}, \"calls\": {calls:?}, \"leaked\": {}, \"signals\": {SIGNALS:?}}}",
        descriptors().saturating_sub(before),
    );
}

fn close_listeners() -> usize {
    let mut closed = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.as_os_str() == "anon_inode:seccomp notify" {
            crate::bare::close(entry.file_name().to_str().unwrap().parse().unwrap());
            closed += 1;
        }
    }
    closed
}

/// `caller as-is surgeon DIR PID interruptible|killable`: attaches the process, unless it is told to die on the way (`LOCUM_DIE_AT`). It
/// is no matter if the last one's listener is still in force.
pub(crate) fn surgeon(pid: &str, wait: &str) {
    let wait = if wait == "killable" { Wait::Killable } else { Wait::Interruptible };
    let process = Thread::hold_living(pid.parse().unwrap()).unwrap();
    let filter = Filter::notify(&[locum_kernel::arch::SYNC]);
    match locum_kernel::attach::attach(&process, (&filter, wait), &[], false) {
        Ok(attached) => attached.without_copy().unwrap(),
        Err(Refusal::Busy(_)) => {}
        Err(refusal) => panic!("{refusal}"),
    }
}

/// Opens the link on a small stack, where there is no room, and on the thread's own, where there is.
pub(crate) fn on_a_small_stack(ground: &Ground) {
    std::os::unix::fs::symlink("/nowhere", ground.path("intact")).unwrap();
    let handle = ground.handle(&ground.path("intact"));
    let (pages, mut small) = (Pages::new(), Small::new());
    let at = pages.put(ground, &handle);
    let mount =
        rustix::fs::open(&ground.dir, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
    let flags = u64::from(OFlags::PATH.bits());
    let on_small = small.call(libc::SYS_open_by_handle_at, [crate::bare::fd(&mount), at, flags, 0]);
    let on_own = crate::bare::open(crate::bare::fd(&mount), at, flags);
    println!(
        "{{\"small\": {:?}, \"own\": {:?}, \"damaged\": {}}}",
        told(on_small),
        told(on_own.min(0)),
        small.is_damaged()
    );
}

/// One thread.
fn look(ground: &Ground, handle: &[u8], index: u64, end: Instant) -> Seen {
    let wanted = std::fs::symlink_metadata(ground.path("intact")).unwrap();
    let pages = Pages::new();
    let at = pages.put(ground, handle);
    let mount =
        rustix::fs::open(&ground.dir, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
    let stack = vec![0_u8; 64 * 1024];
    let own = own_state(&stack, index);
    let mut seen = Seen::default();
    let mut round = index << 32;
    while Instant::now() < end {
        round += 1;
        let on_exec = round.is_multiple_of(2);
        let flags = OFlags::PATH | if on_exec { OFlags::CLOEXEC } else { OFlags::empty() };
        let mut call = Call::new(
            libc::SYS_open_by_handle_at,
            [crate::bare::fd(&mount), at, flags.bits().into(), round, !round, round ^ AT_FDCWD],
            round,
        );
        // SAFETY: the kernel is told to read a handle that lives in `pages`.
        let result = unsafe { call.make() };
        if call.is_damaged() || !is_own_state(&own) {
            seen.damaged += 1;
        }
        let Ok(fd) = i32::try_from(result) else {
            seen.failed += 1;
            continue;
        };
        if fd < 0 {
            if seen.failed == 0 {
                eprintln!("failed: {}", told(result));
            }
            seen.failed += 1;
            continue;
        }
        // SAFETY: the call returned it as a new one; what it really is comes next.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let is_it = rustix::fs::fstat(&fd)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (wanted.dev(), wanted.ino()));
        let is_path = rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| flags.contains(OFlags::PATH));
        let closes = rustix::io::fcntl_getfd(&fd).is_ok_and(|flags| flags.contains(FdFlags::CLOEXEC));
        if is_it && is_path && closes == on_exec {
            seen.right += 1;
        } else {
            seen.wrong += 1;
            // Perhaps another thread's.
            std::mem::forget(fd);
        }
    }
    seen
}

/// The thread's alternate stack and signal mask.
struct Own {
    stack: u64,
    mask: u64,
}

/// Gives the thread an alternate stack and a signal mask that no other has.
fn own_state(stack: &[u8], index: u64) -> Own {
    let wanted = libc::stack_t { ss_sp: stack.as_ptr().cast_mut().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack outlives the thread's calls.
    assert_eq!(unsafe { libc::sigaltstack(&raw const wanted, std::ptr::null_mut()) }, 0);
    let mask = 1_u64 << (40 + index);
    // SAFETY: reads 8 bytes of `mask`.
    let done = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            std::ptr::null_mut::<u64>(),
            8,
        )
    };
    assert_eq!(done, 0);
    Own { stack: stack.as_ptr() as u64, mask }
}

fn is_own_state(own: &Own) -> bool {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    let mut mask = 0_u64;
    // SAFETY: writes one `stack_t`.
    let told = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    // SAFETY: writes 8 bytes to `mask`.
    let done = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, std::ptr::null::<u64>(), &raw mut mask, 8)
    };
    told == 0 && done == 0 && stack.ss_sp as u64 == own.stack && stack.ss_flags == 0 && mask == own.mask
}

fn handle_alarms() {
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: all zeros is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: `action` is whole, and its handler does nothing but add to an atomic.
    assert_eq!(unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) }, 0);
}

fn set_timer(every_us: u64) {
    let every = libc::timeval { tv_sec: 0, tv_usec: every_us.cast_signed() };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: reads one `itimerval`.
    let done = unsafe {
        libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut::<u8>())
    };
    assert_eq!(done, 0);
}

/// How many this process has, without a lifeline.
fn descriptors() -> usize {
    let all = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    all.filter(|target| target.as_os_str() != "anon_inode:seccomp notify").count()
}
