//! `locum demo`.

use std::process::ExitCode;

/// Shows it: an unprivileged workload does real handle traffic while the monitor is killed.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
