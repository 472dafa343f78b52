//! `locum serve`.

use std::process::ExitCode;

/// Keeper and monitor on one machine, each restarted when it dies.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
