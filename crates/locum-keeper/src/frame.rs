//! Messages on a stream socket: length and number of descriptors, eight bytes, then JSON. The descriptors travel with the
//! first bytes, as many at a time as the kernel takes.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use locum_kernel::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The most descriptors that one sendmsg(2) may carry (`SCM_MAX_FD`).
const MOST: usize = 253;
/// The longest JSON: a state of full size with every byte escaped, and some.
const LONGEST: usize = 8 << 20;
const HEADER: usize = 8;

/// Why a peer cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("a message of {0} bytes, wanted at most {LONGEST}")]
    TooLong(usize),
    #[error("a message that is no JSON of ours: {0}")]
    Json(#[from] serde_json::Error),
}

/// A message as it goes over the wire.
pub(crate) fn encode(message: &impl Serialize, descriptors: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    // Our own messages have string keys alone, and a Vec takes all that is written.
    if serde_json::to_writer(&mut bytes, message).is_err() {
        bytes.truncate(HEADER);
    }
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    let length = number(bytes.len() - HEADER);
    bytes[..4].copy_from_slice(&length);
    bytes[4..HEADER].copy_from_slice(&number(descriptors));
    bytes
}

/// How much of a message has been sent.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    bytes: usize,
    descriptors: usize,
}

/// Sends as much as `socket` takes. True: all of it.
pub(crate) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    progress: &mut Progress,
) -> Result<bool, Errno> {
    while progress.bytes < bytes.len() {
        let left = &descriptors[progress.descriptors..];
        let now = &left[..left.len().min(MOST)];
        let end = if now.len() == left.len() { bytes.len() } else { progress.bytes + 1 };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !now.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(now));
        }
        let part = [IoSlice::new(&bytes[progress.bytes..end])];
        match rustix::net::sendmsg(&socket, &part, &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                progress.bytes += sent;
                progress.descriptors += now.len();
            }
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// What one recvmsg(2) brought.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// 0: the other end is closed.
    pub(crate) bytes: usize,
    /// Whether descriptors were lost, for want of room in our table.
    pub(crate) is_cut: bool,
}

/// Receives once.
pub(crate) fn receive(
    socket: impl AsFd,
    bytes: &mut Vec<u8>,
    mut take: impl FnMut(OwnedFd),
) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; 1 << 14];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptors.for_each(&mut take);
        }
    }
    bytes.extend_from_slice(&buffer[..message.bytes]);
    Ok(Received { bytes: message.bytes, is_cut: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// A message and the descriptors that came with it.
pub(crate) type Message<T> = (T, Vec<OwnedFd>);

/// What has come, and is not understood yet.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: VecDeque<OwnedFd>,
}

impl Inbox {
    /// Receives once.
    pub(crate) fn receive(&mut self, socket: impl AsFd) -> Result<Received, Errno> {
        receive(socket, &mut self.bytes, |fd| self.descriptors.push_back(fd))
    }

    /// The next whole message as its bytes, with its descriptors.
    pub(crate) fn next_bytes(&mut self) -> Result<Option<Message<Vec<u8>>>, FrameError> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let header = u64::from_le_bytes(*header);
        let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let (length, descriptors) = (number(header & 0xffff_ffff), number(header >> 32));
        if length > LONGEST {
            return Err(FrameError::TooLong(length));
        }
        if rest.len() < length || self.descriptors.len() < descriptors {
            return Ok(None);
        }
        let rest = self.bytes.split_off(HEADER + length);
        let mut message = std::mem::replace(&mut self.bytes, rest);
        message.drain(..HEADER);
        Ok(Some((message, self.descriptors.drain(..descriptors).collect())))
    }

    /// The next whole message.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<Message<T>>, FrameError> {
        let Some((bytes, descriptors)) = self.next_bytes()? else { return Ok(None) };
        Ok(Some((serde_json::from_slice(&bytes)?, descriptors)))
    }
}
