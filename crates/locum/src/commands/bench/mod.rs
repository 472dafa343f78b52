//! `locum bench`.

use std::process::ExitCode;

/// Latency and throughput against this machine's floor, in the same run.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
