//! `locum profile`.

use std::process::ExitCode;

/// The OCI seccomp profile of a policy, merged into a runtime's default one.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
