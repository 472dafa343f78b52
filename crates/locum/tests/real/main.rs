//! Real components: virtiofsd from crates.io, unprivileged, in containers of crun, runc and rootless podman, and a Linux
//! guest that works on what it serves, while the monitor is killed, or while the guest migrates. `cargo xtask test` sets all of it up.

mod attach;
#[path = "../common/mod.rs"]
mod common;
mod components;
mod container;
mod guest;
mod lesser;
mod listeners;
mod machine;
mod migration;
mod qmp;
mod service;
mod systemd;
mod tree;
