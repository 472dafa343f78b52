//! The other end of the control socket: a monitor's, and that of whoever asks how things are.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use locum_kernel::Errno;
use locum_kernel::notify::{Listener, NotAListener};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::dir::RuntimeDir;
use crate::frame::{self, FrameError, Inbox, Progress};
use crate::protocol::{
    Delivery, FromKeeper, ListenerId, Overlap, PROTOCOL, Report, Role, SessionId, ToKeeper,
};
use crate::snapshot::RELEASE;

/// How a monitor introduces itself.
#[derive(Clone, Debug)]
pub struct Hello {
    /// Its process.
    pub pid: u32,
    /// Its release.
    pub version: String,
    /// The generation that it was given by an earlier keeper.
    pub generation: Option<u64>,
    /// How it stands to other monitors.
    pub overlap: Overlap,
    /// When it started, in nanoseconds since boot. Of two that are to relieve all others, the younger one does.
    pub started: u64,
}

/// How the keeper does.
#[derive(Clone, Debug)]
pub struct KeeperHello {
    /// Its process.
    pub pid: u32,
    /// Its release.
    pub version: String,
    /// The monitor's generation.
    pub generation: u64,
    /// How the monitor stands to others, as the keeper sees it; unable, if the keeper lets none overlap.
    pub overlap: Overlap,
}

/// Both ends of a park, the place where an open file waits while it is handed over.
#[derive(Debug)]
pub struct Park {
    /// Of which slot.
    pub slot: u32,
    /// The end that is sent into.
    pub near: OwnedFd,
    /// The end that is received from.
    pub far: OwnedFd,
}

/// What the keeper tells a monitor.
#[derive(Debug)]
pub enum Event {
    /// A listener is to be served. It may be one that this monitor serves already, after a reconnect to the same keeper.
    Lease {
        /// All that is known of it.
        delivery: Delivery,
        /// The listener.
        listener: Listener,
        /// What earlier monitors parked.
        parks: Vec<Park>,
    },
    /// A listener's last user is gone.
    Ended {
        /// Which.
        listener: ListenerId,
    },
    /// Every lease that the keeper had for this monitor has been told, when [`Connection::ask`] asked.
    Told {
        /// What the keeper holds, whoever has the lease.
        sessions: Vec<SessionId>,
    },
    /// Another monitor serves all that this one does: it is to finish what it has, and to leave, unless there is a lease again.
    Relieved,
    /// Whoever else served is leaving, since [`Connection::relieve`] said so.
    Relieving,
    /// The keeper is gone.
    Lost,
}

/// What can go wrong between a monitor and a keeper.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket's word.
    #[error("the keeper's control socket: {0}")]
    Socket(#[from] io::Error),
    /// It does not talk to us.
    #[error("the keeper refuses: {0}")]
    Refused(String),
    /// It went away before it answered.
    #[error("the keeper went away")]
    Gone,
    /// It goes on as it is.
    #[error("the keeper (pid {}, release {}) serves on as it is: {why}", keeper.pid, keeper.version)]
    NotUpgraded {
        /// Which.
        keeper: KeeperHello,
        /// In its words.
        why: String,
    },
    /// It says what cannot be understood.
    #[error("the keeper cannot be understood: {0}")]
    Misspoken(String),
}

impl ClientError {
    /// Whether there merely is no keeper at the moment.
    pub fn is_absence(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, WouldBlock};
        match self {
            Self::Gone => true,
            Self::Socket(error) => {
                matches!(
                    error.kind(),
                    BrokenPipe | ConnectionRefused | ConnectionReset | NotFound | WouldBlock
                )
            }
            _ => false,
        }
    }
}

impl From<Errno> for ClientError {
    fn from(error: Errno) -> Self {
        Self::Socket(error.into())
    }
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Misspoken(error.to_string())
    }
}

impl From<NotAListener> for ClientError {
    fn from(error: NotAListener) -> Self {
        Self::Misspoken(error.to_string())
    }
}

/// A monitor's connection to its keeper. One thread receives; any may send.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    inbox: Mutex<Inbox>,
    sending: Mutex<()>,
}

impl Connection {
    /// Connects to the keeper of `dir` and introduces itself. Waits for a keeper that is about to be restarted behind an
    /// open socket.
    pub fn open(dir: &RuntimeDir, hello: &Hello) -> Result<(Self, KeeperHello), ClientError> {
        Self::introduce(dir, Role::Monitor, hello)
    }

    fn introduce(dir: &RuntimeDir, role: Role, hello: &Hello) -> Result<(Self, KeeperHello), ClientError> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(dir.control())?)?;
        let connection = Self { socket, inbox: Mutex::default(), sending: Mutex::default() };
        let Hello { pid, version, generation, overlap, started } = hello.clone();
        let protocol = PROTOCOL;
        let hello = ToKeeper::Hello { protocol, role, pid, version, generation, overlap, started };
        connection.send(&hello, &[])?;
        match connection.next()? {
            Some((FromKeeper::Hello { pid, version, generation, overlap, .. }, _)) => {
                Ok((connection, KeeperHello { pid, version, generation, overlap }))
            }
            Some((FromKeeper::Refused { why }, _)) => Err(ClientError::Refused(why)),
            Some((other, _)) => Err(ClientError::Misspoken(format!("wanted a hello, found {other:?}"))),
            None => Err(ClientError::Gone),
        }
    }

    /// Waits for what the keeper has to tell.
    pub fn receive(&self) -> Result<Event, ClientError> {
        let (message, descriptors) = match self.next() {
            Ok(Some(next)) => next,
            Ok(None) => return Ok(Event::Lost),
            // A keeper that dies with something of ours unread.
            Err(error) if error.is_absence() => return Ok(Event::Lost),
            Err(error) => return Err(error),
        };
        match message {
            FromKeeper::Lease { delivery, slots } => {
                let mut descriptors = descriptors.into_iter();
                let too_few = || ClientError::Misspoken("a lease with too few descriptors".to_owned());
                let listener = Listener::try_from(descriptors.next().ok_or_else(too_few)?)?;
                let mut parks = Vec::new();
                for slot in slots {
                    let (Some(near), Some(far)) = (descriptors.next(), descriptors.next()) else {
                        return Err(too_few());
                    };
                    parks.push(Park { slot, near, far });
                }
                Ok(Event::Lease { delivery, listener, parks })
            }
            FromKeeper::Ended { listener } => Ok(Event::Ended { listener }),
            FromKeeper::Relieved {} => Ok(Event::Relieved),
            FromKeeper::Relieving {} => Ok(Event::Relieving),
            FromKeeper::Status(report) => {
                Ok(Event::Told { sessions: report.sessions.into_iter().map(|session| session.id).collect() })
            }
            other => Err(ClientError::Misspoken(format!("wanted a lease or an end, found {other:?}"))),
        }
    }

    /// Has the keeper hold copies of both ends of a park.
    pub fn park(&self, listener: ListenerId, park: &Park) -> Result<(), ClientError> {
        let ends = [park.near.as_fd(), park.far.as_fd()];
        self.send(&ToKeeper::Park { listener, slot: park.slot }, &ends)
    }

    /// Hands a new keeper a listener that this monitor serves, with its parks. The lease stays here.
    pub fn fill(&self, delivery: &Delivery, listener: &Listener, parks: &[Park]) -> Result<(), ClientError> {
        let slots = parks.iter().map(|park| park.slot).collect();
        let ends = parks.iter().flat_map(|park| [park.near.as_fd(), park.far.as_fd()]);
        let descriptors: Vec<_> = [listener.as_fd()].into_iter().chain(ends).collect();
        self.send(&ToKeeper::Fill { delivery: delivery.clone(), slots }, &descriptors)
    }

    /// Asks what the keeper holds; the answer comes behind all that it had to tell before.
    pub fn ask(&self) -> Result<(), ClientError> {
        self.send(&ToKeeper::Status { when_monitored: false }, &[])
    }

    /// Has every other monitor leave: this one serves all that it was told of.
    pub fn relieve(&self) -> Result<(), ClientError> {
        self.send(&ToKeeper::Relieve {}, &[])
    }

    fn send(&self, message: &ToKeeper, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let bytes = frame::encode(message, descriptors.len());
        // Whole messages only, whoever else sends. There is nothing behind the lock that a panic could have broken.
        let _whole = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        frame::send(&self.socket, &bytes, descriptors, &mut Progress::default())?;
        Ok(())
    }

    /// The next message; `None` at the end.
    fn next(&self) -> Result<Option<(FromKeeper, Vec<OwnedFd>)>, ClientError> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(next) = inbox.next()? {
                return Ok(Some(next));
            }
            match inbox.receive(&self.socket) {
                Ok(received) if received.is_cut => {
                    return Err(ClientError::Misspoken(
                        "descriptors were lost: our table is full".to_owned(),
                    ));
                }
                Ok(received) if received.bytes == 0 => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Has the keeper of `dir` go on in `program`, an open file, which is started on copies first. Returns what it was and what it
/// is then, two releases; an error in words of the keeper's own leaves it as it was.
pub fn upgrade(dir: &RuntimeDir, program: BorrowedFd<'_>) -> Result<(KeeperHello, String), ClientError> {
    let (connection, keeper) = observe(dir)?;
    connection.send(&ToKeeper::Upgrade {}, &[program])?;
    match connection.next()? {
        Some((FromKeeper::Upgraded { version }, _)) => Ok((keeper, version)),
        Some((FromKeeper::NotUpgraded { why }, _)) => Err(ClientError::NotUpgraded { keeper, why }),
        Some((other, _)) => Err(ClientError::Misspoken(format!("wanted what became of it, found {other:?}"))),
        None => Err(ClientError::Gone),
    }
}

/// Connects to ask.
fn observe(dir: &RuntimeDir) -> Result<(Connection, KeeperHello), ClientError> {
    let (pid, version, overlap) = (std::process::id(), RELEASE.to_owned(), Overlap::Unable);
    let hello = Hello { pid, version, generation: None, overlap, started: 0 };
    Connection::introduce(dir, Role::Observer, &hello)
}

/// Asks the keeper of `dir` how things are; if `when_monitored`, waits until there is a monitor.
pub fn status(dir: &RuntimeDir, when_monitored: bool) -> Result<Report, ClientError> {
    let (connection, _) = observe(dir)?;
    connection.send(&ToKeeper::Status { when_monitored }, &[])?;
    match connection.next()? {
        Some((FromKeeper::Status(report), _)) => Ok(report),
        Some((other, _)) => Err(ClientError::Misspoken(format!("wanted a status, found {other:?}"))),
        None => Err(ClientError::Gone),
    }
}
