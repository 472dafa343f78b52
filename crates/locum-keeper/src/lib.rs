//! The keeper: it owns the front door and keeps copies of listeners. No privileges, no other duty.
//!
//! A listener that is lost takes its workload's calls with it, so the process that holds on to them does as little as
//! possible: it takes what container runtimes deliver, grants each session to one monitor at a time, and lets go of a
//! listener when its last user is gone. It never receives a call, reads no workload's memory, opens no journal.
//! `docs/protocol.md` describes what it speaks.
#![forbid(unsafe_code)]

pub mod client;
mod door;
mod held;
mod keeper;
mod lease;
pub mod protocol;
mod runtime_dir;
mod sockets;
mod wire;

pub use keeper::{Config, KeeperError, USER, run};
pub use runtime_dir::RuntimeDir;
pub use sockets::Sockets;
