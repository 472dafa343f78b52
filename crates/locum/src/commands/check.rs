//! `locum check`.

use std::process::ExitCode;

/// Can this kernel, this user, this policy do it.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
