//! The journal: one file for each session, mapped by whichever monitor serves it, with one slot for each call in the
//! making and the session's counters. It outlives every process.
//!
//! A monitor has the kernel receive a call straight into a slot, so there is no moment at which only a process knows of
//! it; what it does for the call is noted there before it is done. This crate knows the layout and a slot's life, and
//! decides nothing.
#![forbid(unsafe_code)]

mod counters;
mod layout;
mod seen;
mod slot;

pub use counters::{Counters, Totals};
pub use layout::{Journal, JournalError, SLOTS, VERSION};
pub use seen::{Seen, SeenError};
pub use slot::{Left, Slot, Stage};
