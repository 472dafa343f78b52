//! What one kind of workload may have done for it: the policy file, its checks, what a container runtime says of a workload,
//! and the OCI seccomp profile that hands the calls to locum. No system calls.
#![forbid(unsafe_code)]

mod error;
mod file;
mod policy;
pub mod profile;

mod scope;
mod state;

pub use error::PolicyError;
pub use file::parse;
pub use policy::{Call, Limits, OPath, Policy, builtin};
pub use scope::{Scope, ScopeError, Subject};
pub use state::{Metadata, MetadataError, State, StateError};
