//! One connection at a front door, until its message is whole.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use locum_kernel::Errno;
use locum_kernel::notify::{Listener, NotAListener};

use crate::frame;
use crate::limits::{Exceeded, LONGEST_STATE, MOST_DESCRIPTORS, PATIENCE, Use};
use crate::protocol::Peer;
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

#[derive(Debug)]
enum Descriptor {
    Listener(Listener),
    Foreign(OwnedFd, NotAListener),
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
    descriptors: Vec<Descriptor>,
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

    /// Takes what has come, once. `None`: there is more to wait for.
    pub(crate) fn read(&mut self) -> Result<Option<Brought>, Refused> {
        let descriptors = &mut self.descriptors;
        let received = frame::receive(&self.socket, &mut self.bytes, |fd| {
            descriptors.push(match Listener::recognise(fd.as_fd()) {
                // Only what was just recognised fails here, and that does not.
                Ok(()) => match Listener::try_from(fd) {
                    Ok(listener) => Descriptor::Listener(listener),
                    Err(_) => return,
                },
                Err(found) => Descriptor::Foreign(fd, found),
            });
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
        let mut rest = Vec::new();
        let mut refused = None;
        for (index, descriptor) in self.descriptors.drain(..).enumerate() {
            let is_named = state.fds.get(index).is_some_and(|name| name == "seccompFd");
            match descriptor {
                Descriptor::Listener(listener) if is_named => listeners.push(listener),
                // One that nobody asked for closes at once.
                Descriptor::Listener(_) => {}
                Descriptor::Foreign(fd, found) => {
                    if is_named {
                        refused.get_or_insert(Refused::NotAListener(index, found.clone()));
                    }
                    rest.push(Descriptor::Foreign(fd, found));
                }
            }
        }
        self.descriptors = rest;
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

    /// All that closing may take time.
    pub(crate) fn remains(self) -> Vec<OwnedFd> {
        let foreign = self.descriptors.into_iter().filter_map(|descriptor| match descriptor {
            Descriptor::Foreign(fd, _) => Some(fd),
            Descriptor::Listener(_) => None,
        });
        foreign.chain([self.socket]).collect()
    }
}
