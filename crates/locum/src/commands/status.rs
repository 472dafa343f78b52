//! `locum status`.

use std::process::ExitCode;

/// Who is served, what was refused, which generation answers.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
