//! `locum run`.

use std::process::ExitCode;

/// Runs a command under a policy, with no capabilities.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
