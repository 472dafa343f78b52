//! A program that `locum attach` finds running, in a state of its own: three threads reckon, one makes calls, until the standard
//! input ends. Then it says whether all was reckoned right, and how many of the calls were served.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::bare::{AT_FDCWD, EMPTY_PATH, Ground, Pages, call, name};

static STOP: AtomicBool = AtomicBool::new(false);
static WRONG: AtomicU64 = AtomicU64::new(0);
static SERVED: AtomicU64 = AtomicU64::new(0);
static UNSERVED: AtomicU64 = AtomicU64::new(0);

pub(crate) fn run(ground: &'static Ground, kind: &str) {
    refuse_seccomp();
    if kind == "vfork" {
        return vfork();
    }
    std::env::set_current_dir(&ground.dir).unwrap();
    for seed in 0..3 {
        std::thread::spawn(move || reckon(seed));
    }
    std::thread::spawn(move || ask(ground));
    match kind {
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
}

/// A filter as a container has one: it refuses another.
fn refuse_seccomp() {
    let step =
        |code: u32, k: u32, jt, jf| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::try_from(libc::SYS_seccomp).unwrap(), 0, 1),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | 1, 0, 0),
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

/// A served handle is longer than the kernel's, by its trailer.
fn ask(ground: &Ground) {
    let (pages, text) = (Pages::new(), Pages::new());
    let path = text.put(ground, b"\0");
    let handle = pages.end(8 + 128);
    while !STOP.load(Ordering::Relaxed) {
        ground.write(handle, &128_u32.to_ne_bytes());
        let done = name(AT_FDCWD, path, handle, pages.0, EMPTY_PATH);
        let length = u32::from_ne_bytes(ground.read(handle, 4).try_into().unwrap());
        let counter = if done == 0 && length > 24 { &SERVED } else { &UNSERVED };
        counter.fetch_add(1, Ordering::Relaxed);
        std::thread::yield_now();
    }
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

fn wait_and_tell() {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    STOP.store(true, Ordering::Relaxed);
    let told = [&WRONG, &SERVED, &UNSERVED].map(|counter| counter.load(Ordering::Relaxed));
    println!("{{\"wrong\": {}, \"served\": {}, \"unserved\": {}}}", told[0], told[1], told[2]);
    std::process::exit(0);
}
