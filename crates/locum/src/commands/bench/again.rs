//! How long it takes to find out whose a call is of which only the id is known, and for how long its caller is held when it is asked
//! again.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use locum_kernel::notify::{BUFFER_WORDS, Buffer, Listener, Notification, clear};
use locum_kernel::process::Thread;
use locum_kernel::{arch, socket, waiting};
use rustix::net::RecvFlags;

/// Of each call: how long its caller was looked for, and how long it was held.
pub(super) fn measure(dir: &Path, folder: &Path, calls: usize) -> anyhow::Result<Vec<[Duration; 2]>> {
    let path = folder.join("again.sock");
    let door = UnixListener::bind(&path)?;
    let mut caller = Command::new("/proc/self/exe")
        .args(["bench-caller", "--calls", "1000000000", "--dir"])
        .arg(dir)
        .arg("--floor")
        .arg(&path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let measured = door.accept().map_err(Into::into).and_then(|(sock, _)| {
        let (_, listener) = socket::receive_with(&sock, &mut [0], RecvFlags::empty())?;
        let listener = Listener::try_from(listener.context("the caller sent no listener")?)?;
        // The caller's first call, and each after that is the one before, made anew.
        (0..calls).map(|_| one(&listener)).collect()
    });
    std::fs::remove_file(&path)?;
    caller.kill()?;
    caller.wait()?;
    measured
}

fn one(listener: &Listener) -> anyhow::Result<[Duration; 2]> {
    let buffer: Buffer = [const { std::sync::atomic::AtomicU64::new(0) }; BUFFER_WORDS];
    clear(&buffer);
    listener.receive(&buffer)?;
    let call = Notification::load(&buffer).context("nothing was received")?;
    let numbers: Vec<i32> = arch::CALLS.iter().map(|(_, nr)| *nr).chain([arch::SYNC]).collect();
    // It may have been received before its caller slept.
    let find = |_| {
        let start = Instant::now();
        waiting::caller_of(listener, call.id, &waiting::sleepers(&numbers))
            .map(|found| (found, start.elapsed()))
    };
    let (found, looked) = (0..10).find_map(find).context("nobody is found who made a call")?;
    anyhow::ensure!(found.tid == call.tid, "thread {} was taken for {}", found.tid, call.tid);
    let held = waiting::ask_again(listener, call.id, &Thread::hold(found.tid)?)?;
    Ok([looked, held])
}
