//! `locum profile`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use locum_keeper::RuntimeDir;
use locum_policy::profile::{Runtime, merge};

use super::run::choose_policy;

/// The seccomp profile of a policy, merged into a runtime's default one.
///
/// For podman it goes into a file for --security-opt seccomp=FILE; for crun and runc it is `linux.seccomp` of a bundle's
/// config.json.
#[derive(clap::Args)]
#[command(after_help = "Example: locum profile virtiofsd --runtime podman > locum.json")]
pub(crate) struct Args {
    /// A built-in policy, or a file with one.
    #[arg(value_name = "POLICY")]
    policy: String,
    /// The profile to merge into, in the format of containers-common and Docker.
    #[arg(long, value_name = "FILE", default_value = "/usr/share/containers/seccomp.json")]
    base: PathBuf,
    /// Who is to read the profile.
    #[arg(long, value_enum, default_value_t = Target::Podman)]
    runtime: Target,
    /// Where the keeper works.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// For the front door of the rootless user UID instead of root's.
    #[arg(long, value_name = "UID")]
    door: Option<u32>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Target {
    Crun,
    Runc,
    Podman,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let policy = choose_policy(&args.policy)?;
    let base = std::fs::read_to_string(&args.base).with_context(|| {
        format!(
            "cannot read the base profile {}; name your runtime's default one with --base",
            args.base.display()
        )
    })?;
    let runtime = match args.runtime {
        Target::Crun => Runtime::Crun,
        Target::Runc => Runtime::Runc,
        Target::Podman => Runtime::Podman,
    };
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    let door = args.door.map_or_else(|| runtime_dir.front_door(), |uid| runtime_dir.user_door(uid));
    let profile = merge(&base, &policy, runtime, &door.to_string_lossy())?;
    println!("{}", serde_json::to_string_pretty(&profile)?);
    Ok(ExitCode::SUCCESS)
}
