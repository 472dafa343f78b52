//! A program that `locum attach` finds running, in a state of its own: three threads reckon, one makes calls, until the standard
//! input ends. Then it says whether all was reckoned right, and how many of the calls were served.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use locum_kernel::arch::SYNC;
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::process::Thread;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::bare::{AT_FDCWD, EMPTY_PATH, Ground, Pages, call, name};
use crate::small::{self, Small};

static STOP: AtomicBool = AtomicBool::new(false);
static WRONG: AtomicU64 = AtomicU64::new(0);
static SERVED: AtomicU64 = AtomicU64::new(0);
static UNSERVED: AtomicU64 = AtomicU64::new(0);

pub(crate) fn run(ground: &'static Ground, kind: &str) {
    match kind {
        "holder" => hold_anothers(),
        // Nobody answers at it, and nobody makes that call.
        "engine" => std::mem::forget(Filter::notify(&[SYNC]).install(Wait::Killable).unwrap()),
        _ => {}
    }
    if let Some(rest) = kind.strip_prefix("forbids ") {
        let (call, action) = rest.split_once(' ').unwrap();
        forbid(FORBIDDEN.iter().find(|(name, _)| *name == call).unwrap().1, action == "kill");
    } else {
        // A filter as a container has one: it refuses another.
        forbid(libc::SYS_seccomp, false);
    }
    std::env::set_current_dir(&ground.dir).unwrap();
    match kind {
        "vfork" => return vfork(),
        "small stacks" => return on_small_stacks(ground),
        "storm" => return storm(ground),
        _ => {}
    }
    for seed in 0..3 {
        std::thread::spawn(move || reckon(seed));
    }
    std::thread::spawn(move || ask(ground));
    if kind == "diverged" {
        std::thread::spawn(|| {
            forbid(libc::SYS_sync, false);
            reckon(4);
        });
    }
    match kind {
        "insists" => {
            std::thread::spawn(wait_and_tell);
            insist();
        }
        "sleep" => wait_and_tell(),
        "fork" => {
            std::thread::spawn(wait_and_tell);
            fork();
        }
        "leader gone" => {
            std::thread::spawn(wait_and_tell);
            call(libc::SYS_exit, [0; 6]);
        }
        _ => {
            std::thread::spawn(wait_and_tell);
            reckon(3);
        }
    }
    // Whoever tells ends the program: it would be cut off by a return from here.
    loop {
        std::thread::park();
    }
}

/// A child with a listener of its own, in a table of descriptors that is this program's too.
fn hold_anothers() {
    let flags = u64::try_from(libc::CLONE_FILES | libc::SIGCHLD).unwrap();
    if call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]) == 0 {
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get().cast_unsigned();
        if locum_kernel::confine::die_with_parent(parent) == Ok(true) {
            std::mem::forget(Filter::notify(&[SYNC]).install(Wait::Killable).unwrap());
            loop {
                call(libc::SYS_pause, [0; 6]);
            }
        }
        // SAFETY: the child has memory of its own and ends.
        unsafe { libc::_exit(1) };
    }
    let own = Thread::hold(std::process::id()).unwrap();
    while own.listeners().unwrap().is_empty() {
        std::thread::yield_now();
    }
}

/// What a program may be forbidden.
const FORBIDDEN: [(&str, i64); 5] = [
    ("seccomp", libc::SYS_seccomp),
    ("prctl", libc::SYS_prctl),
    ("close", libc::SYS_close),
    ("rt_sigreturn", libc::SYS_rt_sigreturn),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
];

/// Has one call fail, or kill, for all threads that are still to come.
fn forbid(nr: i64, kill: bool) {
    let step =
        |code: u32, k: u32, jt, jf| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let action = if kill { libc::SECCOMP_RET_KILL_PROCESS } else { libc::SECCOMP_RET_ERRNO | 1 };
    let program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::try_from(nr).unwrap(), 0, 1),
        step(libc::BPF_RET | libc::BPF_K, action, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_ptr().cast_mut() };
    let at = &raw const program as u64;
    let prctl = |what: i32, more: u64, at: u64| {
        call(libc::SYS_prctl, [what.cast_unsigned().into(), more, at, 0, 0, 0])
    };
    assert_eq!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0), 0);
    assert_eq!(prctl(libc::PR_SET_SECCOMP, 2, at), 0);
}

/// Tries without pause what its own filter refuses: is an action known?
fn insist() {
    let action = libc::SECCOMP_RET_ALLOW;
    let args = [u64::from(libc::SECCOMP_GET_ACTION_AVAIL), 0, &raw const action as u64, 0, 0, 0];
    while !STOP.load(Ordering::Relaxed) {
        if call(libc::SYS_seccomp, args) != -i64::from(libc::EPERM) {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn steps(seed: u64) -> (u64, f64) {
    let start = (seed | 1, 1.0 + seed as f64);
    (0..20_000).fold(start, |(word, real), _| {
        let word = (word ^ (word << 13)).rotate_left(7).wrapping_mul(0x2545_f491_4f6c_dd1d);
        (word, real * 1.000_001 + (word >> 40) as f64)
    })
}

fn reckon(seed: u64) {
    let right = steps(seed);
    while !STOP.load(Ordering::Relaxed) {
        if steps(seed).0 != right.0 || steps(seed).1.to_bits() != right.1.to_bits() {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn ask(ground: &Ground) {
    let (pages, text) = (Pages::new(), Pages::new());
    while !STOP.load(Ordering::Relaxed) {
        ask_once(ground, &text, &pages);
        std::thread::yield_now();
    }
}

/// A served handle is longer than the kernel's, by its trailer.
fn ask_once(ground: &Ground, text: &Pages, pages: &Pages) {
    let path = text.put(ground, b"\0");
    let handle = pages.end(8 + 128);
    ground.write(handle, &128_u32.to_ne_bytes());
    let done = name(AT_FDCWD, path, handle, pages.0, EMPTY_PATH);
    let length = u32::from_ne_bytes(ground.read(handle, 4).try_into().unwrap());
    let counter = if done == 0 && length > 24 { &SERVED } else { &UNSERVED };
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Children without end, each of which ends at once.
fn fork() {
    while !STOP.load(Ordering::Relaxed) {
        // SAFETY: the child does nothing but end.
        match unsafe { libc::fork() } {
            // SAFETY: as above.
            0 => unsafe { libc::_exit(0) },
            // SAFETY: waits for a child of ours.
            child => assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child),
        }
    }
}

/// Waits in the kernel for a child that neither ends nor executes another program, as one of vfork(2) may.
fn vfork() {
    let flags = u64::try_from(libc::CLONE_VFORK | libc::SIGCHLD).unwrap();
    if call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]) == 0 {
        let _ = std::io::stdin().read(&mut [0]);
        // SAFETY: the child has memory of its own and ends.
        unsafe { libc::_exit(0) };
    }
    println!("{{\"wrong\": 0, \"served\": 0, \"unserved\": 0}}");
}

/// Every thread is on a small stack, until the standard input ends; the first thread makes calls then.
fn on_small_stacks(ground: &Ground) {
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                let mut small = Small::new();
                small::wait(&mut small);
                WRONG.fetch_add(small.is_damaged().into(), Ordering::Relaxed);
            })
        })
        .collect();
    let mut small = Small::new();
    small::wait(&mut small);
    WRONG.fetch_add(small.is_damaged().into(), Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    ask_once(ground, &Pages::new(), &Pages::new());
    tell();
}

/// One thread, which never gets round to anything for the signals that it gets. Its handler uses little of an alternate stack.
fn storm(ground: &Ground) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: libc::c_int) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: all zeros is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    let stack = vec![0_u8; 16 * 1024];
    let alternate =
        libc::stack_t { ss_sp: stack.as_ptr().cast_mut().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack lives as long as this thread.
    assert_eq!(unsafe { libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) }, 0);
    // SAFETY: `action` is whole, and its handler does nothing but add to an atomic.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
    let own = rustix::process::getpid();
    // SAFETY: there is one thread, so the child may do anything.
    if unsafe { libc::fork() } == 0 {
        // Else whoever reads what its parent says would wait for it too.
        call(libc::SYS_close, [1, 0, 0, 0, 0, 0]);
        locum_kernel::confine::die_with_parent(own.as_raw_nonzero().get().cast_unsigned()).unwrap();
        while rustix::process::kill_process(own, rustix::process::Signal::USR1).is_ok() {}
        // SAFETY: the child has memory of its own and ends.
        unsafe { libc::_exit(0) };
    }
    let right = steps(1);
    let (path, handle) = (Pages::new(), Pages::new());
    let input = std::io::stdin();
    let mut ended = [PollFd::new(&input, PollFlags::IN)];
    while rustix::io::retry_on_intr(|| rustix::event::poll(&mut ended, Some(&Timespec::default()))) == Ok(0) {
        if steps(1) != right {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
        ask_once(ground, &path, &handle);
    }
    assert!(COUNT.load(Ordering::Relaxed) > 0);
    tell();
}

fn wait_and_tell() {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    STOP.store(true, Ordering::Relaxed);
    tell();
}

fn tell() {
    let told = [&WRONG, &SERVED, &UNSERVED].map(|counter| counter.load(Ordering::Relaxed));
    println!("{{\"wrong\": {}, \"served\": {}, \"unserved\": {}}}", told[0], told[1], told[2]);
    std::process::exit(0);
}
