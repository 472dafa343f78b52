//! The floor: the same caller, answered by the fewest system calls that can do it.

use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::notify::Listener;
use locum_kernel::{Errno, arch, socket};
use rustix::net::RecvFlags;

use super::caller::Times;

/// Installs a filter for the calls that are measured and sends its listener.
pub(super) fn hand_over(sock: &UnixStream) -> anyhow::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let calls: Vec<i32> = arch::CALLS.iter().map(|(_, nr)| *nr).chain([arch::SYNC]).collect();
    let filter = Filter::notify(&calls);
    let listener = match filter.install(Wait::Killable) {
        Err(Errno::INVAL) => filter.install(Wait::Interruptible)?,
        installed => installed?,
    };
    socket::send_with(sock, b"L", listener.as_fd())?;
    Ok(())
}

/// One round of `calls` calls of each kind.
pub(super) fn round(dir: &Path, folder: &Path, calls: usize) -> anyhow::Result<Times> {
    let path = folder.join("floor.sock");
    let door = UnixListener::bind(&path)?;
    let child = Command::new("/proc/self/exe")
        .args(["bench-caller", "--calls", &calls.to_string(), "--dir"])
        .arg(dir)
        .arg("--floor")
        .arg(&path)
        .stdout(Stdio::piped())
        .spawn()?;
    let (sock, _) = door.accept()?;
    std::fs::remove_file(&path)?;
    let (_, listener) = socket::receive_with(&sock, &mut [0], RecvFlags::empty())?;
    let listener = Listener::try_from(listener.context("the floor's caller sent no listener")?)?;
    // Not on kernels before 6.6; locum does the same.
    let _ = listener.wake_synchronously();
    let served = std::thread::spawn(move || locum_kernel::floor::serve(&listener));
    let output = child.wait_with_output()?;
    served.join().map_err(|_| anyhow::anyhow!("the floor panicked"))??;
    serde_json::from_slice(&output.stdout).context("the floor's caller failed")
}
