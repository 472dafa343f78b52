//! The kernel as locum sees it: one safe function for each thing that is asked of it.
//!
//! Every `unsafe` line of the project is here, each with the kernel's contract that makes it sound. Nothing here
//! decides anything. Errors are the kernel's own [`Errno`] wherever the caller of a system call could see them.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("locum runs on Linux on x86_64; `arch.rs` is what a port has to add");

pub mod arch;
pub mod attach;
pub mod confine;
pub mod crash;
pub mod credentials;
pub mod fault;
pub mod filter;
pub mod floor;
pub mod hand_over;
pub mod handle;
pub mod lock;
pub mod mapping;
pub mod memory;
pub mod notify;
pub mod process;
pub mod program;
pub mod ptrace;
pub mod signal;
pub mod socket;
pub mod stack;
pub mod table;
pub mod verdict;
pub mod waiting;

pub use rustix::io::Errno;
