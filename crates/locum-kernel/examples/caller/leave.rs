//! Threads that leave in the middle of a call: each opens a symbolic link by handle, `O_PATH`, until a signal ends a call of it, and
//! then ends. At the end somebody else opens it, and tells how many sockets the process has been left with.

use std::io::BufRead as _;
use std::os::unix::thread::JoinHandleExt as _;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::bare::{Ground, Pages, close, fd, open};

/// Each line of standard input is one such thread; the next has it leave.
pub(crate) fn run(ground: &Ground) {
    std::os::unix::fs::symlink("/nowhere", ground.path("leave")).unwrap();
    let handle = ground.handle(&ground.path("leave"));
    let (pages, flags) = (Pages::new(), u64::from(OFlags::PATH.bits()));
    let at = pages.put(ground, &handle);
    let mount =
        rustix::fs::open(&ground.dir, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
    let mount = fd(&mount);
    let opened = move || {
        let result = open(mount, at, flags);
        if result >= 0 {
            close(result);
        }
        result
    };
    interrupt_by_signal();
    let mut lines = std::io::stdin().lock().lines();
    while lines.next().is_some() {
        let thread = std::thread::spawn(move || while opened() != -i64::from(libc::EINTR) {});
        lines.next();
        while !thread.is_finished() {
            // SAFETY: the thread has not been joined, so its id is its own.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap();
        println!("left");
    }
    let failed = (0..10).filter(|_| opened() < 0).count();
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let sockets = targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count();
    println!("{{\"failed\": {failed}, \"sockets\": {sockets}}}");
}

/// Has SIGUSR1 end calls with EINTR.
fn interrupt_by_signal() {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: all zeros is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is whole, and its handler does nothing.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
}
