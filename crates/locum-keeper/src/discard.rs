//! Closing what a stranger sent. That may block for as long as the stranger likes: a file of its own FUSE file system is
//! flushed by its own server, a TCP socket lingers. So a thread for each door does it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};

use crate::limits::MOST_DISCARDED;

/// The thread that closes.
#[derive(Debug)]
pub(crate) struct Discarder {
    to: Sender<Vec<OwnedFd>>,
    waiting: Arc<AtomicUsize>,
}

impl Discarder {
    /// `wake`, an eventfd, is written to when a door may be served again, and when nothing is left.
    pub(crate) fn start(wake: Arc<OwnedFd>) -> std::io::Result<Self> {
        let (to, from) = mpsc::channel::<Vec<OwnedFd>>();
        let waiting = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&waiting);
        std::thread::Builder::new().name("discard".into()).spawn(move || {
            for descriptors in from {
                drop(descriptors);
                if [1, MOST_DISCARDED].contains(&left.fetch_sub(1, Ordering::AcqRel)) {
                    // Full only if nobody has read it for 2^64 times.
                    let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
                }
            }
        })?;
        Ok(Self { to, waiting })
    }

    /// Closes `descriptors`, some time.
    pub(crate) fn discard(&self, descriptors: Vec<OwnedFd>) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        // The thread lives as long as we do.
        let _ = self.to.send(descriptors);
    }

    /// Whether nothing waits to be closed or is being closed.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Whether so much waits to be closed that its door should pause.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Acquire) >= MOST_DISCARDED
    }
}
