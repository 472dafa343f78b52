//! One connection at a front door: a container runtime that delivers listeners.
//!
//! A runtime may connect long before it has anything to say (crun's `create`), keep the connection open long after (its
//! foreground `run`), send its state in pieces, or send nothing at all. Where a state ends is found from its JSON alone.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use locum_kernel::notify::{Listener, NotAListener};
use locum_policy::{State, StateError};
use rustix::net::{RecvAncillaryBuffer, RecvFlags};

use crate::protocol::{Door, Peer};
use crate::wire::{LONGEST_STATE, descriptors};

/// The most descriptors that the kernel lets through in one message (`SCM_MAX_FD`).
const MOST_AT_ONCE: usize = 253;
/// The most descriptors that one delivery may bring.
const MOST: usize = 256;
/// How long a state may take from its first byte to its last.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a connection is closed without anything having been delivered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Turned {
    #[error("the runtime closed the connection without a state")]
    Silent,
    #[error("the connection ended in the middle of a state, after {0} bytes")]
    CutOff(usize),
    #[error("reading failed: {0}")]
    Read(#[from] io::Error),
    #[error("wanted a state of at most {LONGEST_STATE} bytes, found a longer one")]
    TooLong,
    #[error("wanted at most {MOST} descriptors, found more")]
    TooMany,
    #[error("wanted a state that is whole {} s after its first byte; it was not", DEADLINE.as_secs())]
    Late,
    #[error("wanted JSON that begins with {{, found {0:?}")]
    NotJson(char),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("wanted text, found bytes that are not UTF-8")]
    NotText,
    #[error("wanted a descriptor named seccompFd, found {0}")]
    NoListener(String),
}

/// What a connection brought.
#[derive(Debug)]
pub(crate) struct Brought {
    pub(crate) state: State,
    pub(crate) text: String,
    pub(crate) listeners: Vec<Listener>,
}

/// A connection that has not delivered yet.
#[derive(Debug)]
pub(crate) struct Visitor {
    pub(crate) door: Door,
    pub(crate) peer: Peer,
    socket: OwnedFd,
    text: Vec<u8>,
    end: End,
    fds: Vec<OwnedFd>,
    since: Option<Instant>,
}

impl AsFd for Visitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Visitor {
    pub(crate) fn new(door: Door, peer: Peer, socket: OwnedFd) -> Self {
        Self { door, peer, socket, text: Vec::new(), end: End::default(), fds: Vec::new(), since: None }
    }

    /// When the connection has to have delivered, if it has begun to.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + DEADLINE)
    }

    /// Reads what is there. `None`: more is to come.
    pub(crate) fn read(&mut self) -> Result<Option<Brought>, Turned> {
        let mut piece = [0; 16 * 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_AT_ONCE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received =
            rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut piece)], &mut control, flags);
        self.fds.extend(descriptors(&mut control));
        let got = match received {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(Turned::Read(error.into())),
            Ok(message) => message.bytes,
        };
        if self.fds.len() > MOST {
            return Err(Turned::TooMany);
        }
        if got == 0 {
            let kept = self.text.len();
            return Err(if kept == 0 { Turned::Silent } else { Turned::CutOff(kept) });
        }
        self.since.get_or_insert_with(Instant::now);
        let piece = &piece[..got];
        let whole = self.end.find(piece)?;
        let upto = whole.unwrap_or(got);
        if self.text.len() + upto > LONGEST_STATE {
            return Err(Turned::TooLong);
        }
        self.text.extend_from_slice(&piece[..upto]);
        if whole.is_none() {
            return Ok(None);
        }
        self.take().map(Some)
    }

    fn take(&mut self) -> Result<Brought, Turned> {
        let text = String::from_utf8(std::mem::take(&mut self.text)).map_err(|_| Turned::NotText)?;
        let state = State::parse(&text)?;
        let named = state.fds.iter().map(String::as_str).chain(std::iter::repeat(""));
        let meant: Vec<_> = self
            .fds
            .drain(..)
            .zip(named)
            .filter_map(|(fd, name)| (name == "seccompFd").then_some(fd))
            .collect();
        let (mut listeners, mut others) = (Vec::new(), Vec::new());
        for fd in meant {
            match Listener::try_from(fd) {
                Ok(listener) => listeners.push(listener),
                Err(NotAListener { found }) => others.push(found),
            }
        }
        if listeners.is_empty() {
            let found = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
            return Err(Turned::NoListener(found));
        }
        Ok(Brought { state, text, listeners })
    }
}

/// Finds the end of one JSON object, each byte looked at once.
#[derive(Debug, Default)]
struct End {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl End {
    /// How many bytes of `piece` belong to the object, if it ends there.
    fn find(&mut self, piece: &[u8]) -> Result<Option<usize>, Turned> {
        for (index, byte) in piece.iter().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Ok(Some(index + 1));
                    }
                }
                b' ' | b'\t' | b'\r' | b'\n' => {}
                other if self.depth == 0 => return Err(Turned::NotJson(char::from(*other))),
                _ => {}
            }
            // A string can only be inside an object.
            if self.depth == 0 && self.in_string {
                return Err(Turned::NotJson('"'));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_found_in_any_number_of_pieces() {
        let text = br#" { "a": "}\"]\\", "b": [ { } ], "c": "\\" } trailing"#;
        let whole = End::default().find(text).unwrap().unwrap();
        assert_eq!(&text[whole - 1..=whole], b"} ");
        for size in 1..text.len() {
            let (mut end, mut seen) = (End::default(), 0);
            for piece in text.chunks(size) {
                if let Some(within) = end.find(piece).unwrap() {
                    assert_eq!(seen + within, whole, "in pieces of {size}");
                    break;
                }
                seen += piece.len();
            }
        }
    }

    #[test]
    fn what_cannot_be_an_object_is_told_at_once() {
        for text in ["x", "\"{}\"", "}", "GET / HTTP/1.1", "1"] {
            assert!(matches!(End::default().find(text.as_bytes()), Err(Turned::NotJson(_))), "{text}");
        }
    }
}
