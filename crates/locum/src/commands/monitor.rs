//! `locum monitor`.

use std::path::PathBuf;
use std::process::ExitCode;

use locum_keeper::RuntimeDir;
use locum_monitor::Config;

/// The monitor alone: answers the calls of the sessions that its keeper holds. Needs root.
///
/// It may be killed at any moment: the next one settles what it left.
#[derive(clap::Args)]
#[command(after_help = "Example: locum monitor --policy /etc/locum/policy.toml")]
pub(crate) struct Args {
    /// Where sockets, journals and single workloads' policies are.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// The directory of keys; one key is made there if there is none.
    #[arg(long, value_name = "DIR", default_value = "/etc/locum/keys")]
    keys: PathBuf,
    /// Policies beside the built-in ones; of two with one name, the later counts.
    #[arg(long = "policy", value_name = "FILE")]
    policies: Vec<PathBuf>,
    /// End with this process.
    #[arg(long, hide = true)]
    parent: Option<u32>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    locum_monitor::run(Config {
        runtime_dir: RuntimeDir::new(&args.runtime_dir),
        keys: args.keys.clone(),
        policies: args.policies.clone(),
        parent: args.parent,
    })?;
    Ok(ExitCode::SUCCESS)
}
