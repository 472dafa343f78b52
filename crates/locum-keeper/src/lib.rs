//! The keeper: the process that owns the front door and keeps copies of listeners. It has no privileges and no other
//! duty, so that it need not change and need not die.
//!
//! It never receives a notification, opens no journal and looks at no workload. `docs/protocol.md` describes what is
//! said at its two doors.
#![forbid(unsafe_code)]

mod arrival;
pub mod client;
mod dir;
mod discard;
mod frame;
mod keeper;
mod lease;
mod limits;
mod memfd;
mod monitors;
pub mod protocol;
mod registry;
mod snapshot;
mod sockets;
mod state;
mod store;
pub mod systemd;

pub use dir::RuntimeDir;
pub use keeper::{KeeperError, rehearse, resume, run};
pub use snapshot::SnapshotError;
pub use sockets::{SocketError, Sockets};
