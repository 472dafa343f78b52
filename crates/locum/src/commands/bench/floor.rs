//! The floor: the same caller, answered by the fewest system calls that can do it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::notify::Listener;
use locum_kernel::{Errno, arch};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

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
    let fds = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(sock, &[IoSlice::new(b"L")], &mut control, SendFlags::NOSIGNAL)?;
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
    let listener = Listener::try_from(receive(&sock)?)?;
    // Not on kernels before 6.6; locum does the same.
    let _ = listener.wake_synchronously();
    let served = std::thread::spawn(move || locum_kernel::floor::serve(&listener));
    let output = child.wait_with_output()?;
    served.join().map_err(|_| anyhow::anyhow!("the floor panicked"))??;
    serde_json::from_slice(&output.stdout).context("the floor's caller failed")
}

fn receive(sock: &UnixStream) -> anyhow::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(sock, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .context("the floor's caller sent no listener")
}
