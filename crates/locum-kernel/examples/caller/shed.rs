//! A workload that makes calls without end, and gets rid of its lifeline whenever a line comes in: it closes it, executes itself
//! anew, or has another process go on. At the end it says how many calls failed.

use std::io::BufRead as _;
use std::os::unix::process::CommandExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::bare::{AT_FDCWD, EMPTY_PATH, Ground, Pages, call, name};

static LINES: AtomicUsize = AtomicUsize::new(0);
static ENDED: AtomicUsize = AtomicUsize::new(0);

pub(crate) fn run(ground: &Ground, kind: &str, failed: u64) {
    let mut failed = failed;
    if kind == "end" {
        return by_children(ground);
    }
    read_lines();
    while ENDED.load(Ordering::Relaxed) == 0 {
        failed += ask(ground);
        if LINES.load(Ordering::Relaxed) == 0 {
            continue;
        }
        LINES.store(0, Ordering::Relaxed);
        if kind == "exec" {
            let mut again = std::process::Command::new("/proc/self/exe");
            again.args(["as-is", "shed"]).arg(&ground.dir).args([kind, &failed.to_string()]);
            panic!("{}", again.exec());
        }
        close_lifeline();
    }
    println!("{failed}");
}

/// A byte at a time, so that nothing of what is still to come is lost by exec.
fn read_lines() {
    std::thread::spawn(|| {
        let mut byte = [0];
        while rustix::io::read(std::io::stdin(), &mut byte) == Ok(1) {
            LINES.fetch_add(1, Ordering::Relaxed);
        }
        ENDED.store(1, Ordering::Relaxed);
    });
}

/// Each child calls until it is told to end; then the next one does.
fn by_children(ground: &Ground) {
    let (mut failed, mut lines) = (0_u64, std::io::stdin().lock().lines());
    loop {
        let (end, tell) = rustix::pipe::pipe().unwrap();
        // SAFETY: there is one thread, so the child may do anything.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(tell);
            // Its own memory, not its parent's.
            let ground = Ground::new(ground.dir.to_str().unwrap(), false);
            let (mut poll, mut bad) = ([PollFd::new(&end, PollFlags::IN)], 0);
            while rustix::event::poll(&mut poll, Some(&Timespec::default())) == Ok(0) {
                bad += ask(&ground);
            }
            std::process::exit(i32::from(bad > 0));
        }
        let is_last = lines.next().is_none();
        drop(tell);
        let mut status = 0;
        // SAFETY: waits for a child of ours.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        failed += u64::from(status != 0);
        if is_last {
            break;
        }
    }
    println!("{failed}");
}

/// One call; 1 if it fails.
fn ask(ground: &Ground) -> u64 {
    let (pages, text) = (Pages::new(), Pages::new());
    let path = text.put(ground, b"\0");
    let handle = pages.end(8 + 128);
    ground.write(handle, &128_u32.to_ne_bytes());
    u64::from(name(AT_FDCWD, path, handle, pages.0, EMPTY_PATH) != 0)
}

fn close_lifeline() {
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        if std::fs::read_link(entry.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:seccomp notify")
        {
            let fd: u64 = entry.file_name().to_str().unwrap().parse().unwrap();
            call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
        }
    }
}
