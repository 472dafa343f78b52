//! What a service manager is told that started us: sd_notify(3). Nothing where none did.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use locum_kernel::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use sd_notify::NotifyState;

/// A service's `WatchdogSec` has to be some times this.
const BEAT: Duration = Duration::from_secs(1);

/// Tells `state`.
pub fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("cannot notify systemd: {error}");
    }
}

/// The service manager, as who keeps descriptors for us. Unlike [`tell`], this never waits for it.
#[derive(Debug)]
pub(crate) struct Manager {
    socket: OwnedFd,
    address: SocketAddrUnix,
}

impl Manager {
    /// `None`: none started us.
    pub(crate) fn start() -> Option<Self> {
        let path = std::env::var_os("NOTIFY_SOCKET")?;
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name),
            None => SocketAddrUnix::new(path),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
        match (socket, address) {
            (Ok(socket), Ok(address)) => Some(Self { socket, address }),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!("cannot have systemd store descriptors: {error}");
                None
            }
        }
    }

    /// Has copies of `descriptors` stored. EAGAIN: it has not read what it was told before.
    pub(crate) fn store(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        // POLLERR of a listener may come of a signal, and would have systemd drop it.
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), descriptors)
    }

    /// Has all that is stored as `name` closed. EAGAIN: it has not read what it was told before.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Errno> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let text = [IoSlice::new(text.as_bytes())];
        rustix::net::sendmsg_addr(&self.socket, &self.address, &text, &mut control, SendFlags::NOSIGNAL)
            .map(drop)
    }
}

/// Tells again and again that a loop goes on, so that one that hangs is killed, and the next settles what it left. It does not
/// ask for `WATCHDOG_USEC`, which a process that is started by `ExecReload` does not get.
#[derive(Debug)]
pub struct Heartbeat {
    /// `None`: nobody wants to know.
    due: Option<Instant>,
}

impl Heartbeat {
    /// The first is due now.
    pub fn start() -> Self {
        Self { due: std::env::var_os("NOTIFY_SOCKET").map(|_| Instant::now()) }
    }

    /// Tells, if it is due.
    pub fn beat(&mut self) {
        let now = Instant::now();
        if self.due.is_some_and(|due| due <= now) {
            tell(NotifyState::Watchdog);
            self.due = Some(now + BEAT);
        }
    }

    /// When the next is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }
}
