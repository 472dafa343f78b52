//! The command line of locum.
#![forbid(unsafe_code)]

mod commands;
mod supervise;
mod traffic;

use std::process::ExitCode;
use std::sync::OnceLock;

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
    Attach(commands::attach::Args),
    Detach(commands::attach::DetachArgs),
    Profile(commands::profile::Args),
    Status(commands::status::Args),
    Keys(commands::keys::Args),
    Check(commands::check::Args),
    Bench(commands::bench::Args),
    #[command(hide = true)]
    Confined(commands::confined::Args),
    #[command(hide = true)]
    Sweep(commands::sweep::Args),
    #[command(hide = true)]
    Traffic(traffic::Args),
    #[command(hide = true)]
    BenchCaller(commands::bench::caller::Args),
}

/// What is logged, by this process and by those that it starts.
pub(crate) static LOG: OnceLock<String> = OnceLock::new();

/// `LOCUM_LOG`; without it, what a person at a terminal wants of a command that shows something else.
fn log_filter(command: &Command) -> String {
    let wanted = std::env::var("LOCUM_LOG").ok();
    wanted.unwrap_or_else(|| match command {
        Command::Demo(_) | Command::Bench(_) => "off".to_owned(),
        Command::Run(_) | Command::Confined(_) => "warn".to_owned(),
        _ => "info".to_owned(),
    })
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let log = EnvFilter::new(LOG.get_or_init(|| log_filter(&command)));
    tracing_subscriber::fmt().with_env_filter(log).with_writer(std::io::stderr).with_target(false).init();
    let done = match &command {
        Command::Demo(args) => commands::demo::run(args),
        Command::Run(args) => commands::run::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Keeper(args) => commands::keeper::run(args),
        Command::Monitor(args) => commands::monitor::run(args),
        Command::Attach(args) => commands::attach::run(args),
        Command::Detach(args) => commands::attach::detach(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Status(args) => commands::status::run(args),
        Command::Keys(args) => commands::keys::run(args),
        Command::Check(args) => commands::check::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Confined(args) => commands::confined::run(args),
        Command::Sweep(args) => commands::sweep::run(args),
        Command::Traffic(args) => traffic::run(args),
        Command::BenchCaller(args) => commands::bench::caller::run(args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("locum: {error:#}");
        ExitCode::from(1)
    })
}
