//! How the tests set themselves up and run.

#![forbid(unsafe_code)]

mod setup;
mod step;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "How locum's tests set themselves up and run")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what the tests need and is missing (as root, on Debian)
    Setup,
    /// Set up, then run every check and every test
    Test {
        /// Only this part
        #[arg(long, value_enum)]
        only: Option<test::Part>,
    },
    /// Set up, then compare virtiofsd under locum with the privileged one
    BenchVirtiofs,
}

fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().command {
        Command::Setup => setup::all().map(|()| ExitCode::SUCCESS),
        Command::Test { only } => test::run(only),
        Command::BenchVirtiofs => bench_virtiofs(),
    }
}

fn bench_virtiofs() -> anyhow::Result<ExitCode> {
    setup::all()?;
    let mut bench =
        step::command("cargo", &["bench", "--quiet", "--package", "locum", "--bench", "virtiofs"]);
    let status = bench.env("LOCUM_REAL", step::real()).status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
