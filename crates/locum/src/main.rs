//! The command line of locum.
#![forbid(unsafe_code)]

mod commands;
mod supervise;
mod traffic;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

/// Makes privileged system calls in the place of an unprivileged container, by a policy.
#[derive(clap::Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Demo(commands::demo::Args),
    Run(commands::run::Args),
    Serve(commands::serve::Args),
    Keeper(commands::keeper::Args),
    Monitor(commands::monitor::Args),
    Profile(commands::profile::Args),
    Status(commands::status::Args),
    Check(commands::check::Args),
    Bench(commands::bench::Args),
    #[command(hide = true)]
    Confined(commands::confined::Args),
    #[command(hide = true)]
    Sweep(commands::sweep::Args),
    #[command(hide = true)]
    Traffic(traffic::Args),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("LOCUM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let done = match &Cli::parse().command {
        Command::Demo(args) => commands::demo::run(args),
        Command::Run(args) => commands::run::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Keeper(args) => commands::keeper::run(args),
        Command::Monitor(args) => commands::monitor::run(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Status(args) => commands::status::run(args),
        Command::Check(args) => commands::check::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Confined(args) => commands::confined::run(args),
        Command::Sweep(args) => commands::sweep::run(args),
        Command::Traffic(args) => traffic::run(args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("locum: {error:#}");
        ExitCode::from(1)
    })
}
