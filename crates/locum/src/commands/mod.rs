//! One file for each command.

pub(crate) mod attach;
pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod confined;
pub(crate) mod demo;
pub(crate) mod keeper;
pub(crate) mod keys;
pub(crate) mod monitor;
mod processes;
pub(crate) mod profile;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod sweep;
mod whose;
