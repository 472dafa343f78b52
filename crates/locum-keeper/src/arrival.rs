//! One connection at a front door, until its message is whole.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use locum_kernel::notify::{Listener, NotAListener};
use locum_kernel::{Errno, socket};

use crate::frame;
use crate::limits::{Exceeded, LONGEST_STATE, MOST_DESCRIPTORS, PATIENCE, Use};
use crate::protocol::Peer;
use crate::snapshot::{ArrivalSnapshot, Inherited, Named, SnapshotError};
use crate::state::{NotAnObject, Scanner, State};

/// Why a connection brought nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("it was closed without a word")]
    Silent,
    #[error("it was closed after {0} bytes of an unfinished state")]
    Unfinished(usize),
    #[error("a state took longer than {} s", PATIENCE.as_secs())]
    Slow,
    #[error("a state of more than {LONGEST_STATE} bytes")]
    TooLong,
    #[error("more than {MOST_DESCRIPTORS} descriptors")]
    TooManyDescriptors,
    #[error("descriptors were lost: the keeper's table is full")]
    DescriptorsLost,
    #[error(transparent)]
    NotAnObject(#[from] NotAnObject),
    #[error("the state cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the state is no UTF-8: {0}")]
    Text(#[from] std::str::Utf8Error),
    #[error("the state's `fds` name no seccompFd")]
    NoListenerNamed,
    #[error("the state names descriptor {0} as seccompFd, and {1} came")]
    DescriptorMissing(usize, usize),
    #[error("descriptor {0}: {1}")]
    NotAListener(usize, NotAListener),
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    #[error("reading: {0}")]
    Read(#[from] Errno),
}

/// What a connection brought.
#[derive(Debug)]
pub(crate) struct Brought {
    pub(crate) state: State,
    pub(crate) text: String,
    pub(crate) listeners: Vec<Listener>,
    /// Whether there was something behind the state.
    pub(crate) has_more: bool,
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Arrival {
    /// Which door, by its number.
    pub(crate) door: usize,
    pub(crate) peer: Peer,
    pub(crate) socket: OwnedFd,
    scanner: Scanner,
    bytes: Vec<u8>,
    /// All that came. What was no listener is not kept.
    descriptors: Vec<Result<Listener, NotAListener>>,
    pub(crate) deadline: Option<Instant>,
}

impl Arrival {
    pub(crate) fn new(door: usize, peer: Peer, socket: OwnedFd) -> Self {
        let (bytes, descriptors) = (Vec::new(), Vec::new());
        Self { door, peer, socket, scanner: Scanner::default(), bytes, descriptors, deadline: None }
    }

    pub(crate) fn used(&self) -> Use {
        let descriptors = 1 + self.descriptors.len();
        Use { connections: 1, listeners: 0, descriptors, bytes: self.bytes.capacity() }
    }

    /// Takes what has come, once. `None`: there is more to wait for. What is no listener goes into `foreign`: closing it may
    /// take time.
    pub(crate) fn read(&mut self, foreign: &mut Vec<OwnedFd>) -> Result<Option<Brought>, Refused> {
        let descriptors = &mut self.descriptors;
        let received = frame::receive(&self.socket, &mut self.bytes, |fd| {
            match Listener::recognise(fd.as_fd()) {
                // What was just recognised is one.
                Ok(()) => descriptors.push(Listener::try_from(fd)),
                Err(found) => {
                    descriptors.push(Err(found));
                    foreign.push(fd);
                }
            }
        });
        let received = match received {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            received => received?,
        };
        if received.is_cut {
            return Err(Refused::DescriptorsLost);
        }
        if self.descriptors.len() > MOST_DESCRIPTORS {
            return Err(Refused::TooManyDescriptors);
        }
        if received.bytes == 0 {
            let all = self.bytes.len();
            return Err(if all == 0 { Refused::Silent } else { Refused::Unfinished(all) });
        }
        self.deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
        match self.scanner.end(&self.bytes)? {
            Some(end) if end > LONGEST_STATE => Err(Refused::TooLong),
            Some(end) => self.take(end).map(Some),
            None if self.bytes.len() > LONGEST_STATE => Err(Refused::TooLong),
            None => Ok(None),
        }
    }

    /// Takes the listeners that the state, which ends at `end`, names.
    fn take(&mut self, end: usize) -> Result<Brought, Refused> {
        let text = std::str::from_utf8(&self.bytes[..end])?.trim_start().to_owned();
        let has_more = !self.bytes[end..].trim_ascii().is_empty();
        let state: State = serde_json::from_str(&text)?;
        let came = self.descriptors.len();
        let mut listeners = Vec::new();
        let mut refused = None;
        for (index, descriptor) in self.descriptors.drain(..).enumerate() {
            // One that nobody asked for closes at once.
            if state.fds.get(index).is_some_and(|name| name == "seccompFd") {
                match descriptor {
                    Ok(listener) => listeners.push(listener),
                    Err(found) => drop(refused.get_or_insert(Refused::NotAListener(index, found))),
                }
            }
        }
        let missing = state.fds.iter().enumerate().skip(came).find(|(_, name)| *name == "seccompFd");
        if let Some((index, _)) = missing {
            refused.get_or_insert(Refused::DescriptorMissing(index, came));
        }
        match refused {
            Some(refused) => Err(refused),
            None if listeners.is_empty() => Err(Refused::NoListenerNamed),
            None => Ok(Brought { state, text, listeners, has_more }),
        }
    }

    /// For a keeper that goes on.
    pub(crate) fn snapshot<'a>(&'a self, id: u64, named: &mut Named<'a>) -> ArrivalSnapshot {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let number = |descriptor: &'a Result<Listener, NotAListener>| match descriptor {
            Ok(listener) => Ok(named.name(listener)),
            Err(found) => Err(found.found.clone()),
        };
        ArrivalSnapshot {
            id,
            door: self.door,
            descriptors: self.descriptors.iter().map(number).collect(),
            socket: named.name(&self.socket),
            bytes: self.bytes.clone(),
            left_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// Goes on from `snapshot`.
    pub(crate) fn resume(snapshot: ArrivalSnapshot, from: &mut Inherited) -> Result<Self, SnapshotError> {
        let socket = from.take(snapshot.socket, "a delivery's connection")?;
        let peer =
            socket::peer(&socket).map_err(|error| SnapshotError::Own("ask who delivers", error.into()))?;
        let mut arrival = Self::new(snapshot.door, peer.into(), socket);
        arrival.bytes = snapshot.bytes;
        // It finds the end where the one before would have: each byte is looked at once more.
        arrival
            .scanner
            .end(&arrival.bytes)
            .map_err(|_| SnapshotError::Torn("what is no state is being read"))?;
        for descriptor in snapshot.descriptors {
            arrival.descriptors.push(match descriptor {
                Ok(fd) => Ok(from.listener(fd)?),
                Err(found) => Err(NotAListener { found }),
            });
        }
        arrival.deadline =
            snapshot.left_ms.and_then(|left| Instant::now().checked_add(Duration::from_millis(left)));
        Ok(arrival)
    }
}
