//! `locum keys`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use locum_keeper::RuntimeDir;
use locum_monitor::key_users::KeyUsers;
use locum_monitor::keys::{self, KeyId, Keys};
use serde_json::json;

/// The keys that sign file handles: make, list, check and retire them. A running monitor sees each change within a second.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum keys list")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Create(CreateArgs),
    List(ListArgs),
    Check(CheckArgs),
    Retire(RetireArgs),
}

#[derive(clap::Args)]
struct Directory {
    /// The directory of keys.
    #[arg(long, value_name = "DIR", default_value = "/etc/locum/keys")]
    keys: PathBuf,
}

#[derive(clap::Args)]
struct Users {
    /// Where the sessions' records are.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
}

/// Makes a new key. It signs for sessions that begin from now on; those that run keep theirs.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum keys create")]
struct CreateArgs {
    #[command(flatten)]
    directory: Directory,
}

/// Lists the keys that are in order: when each was made, which is the newest, which sessions sign with it.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum keys list --json")]
struct ListArgs {
    #[command(flatten)]
    directory: Directory,
    #[command(flatten)]
    users: Users,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// Says of every file whether it is in order. Exit code 1: one is not, or there is none.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum keys check")]
struct CheckArgs {
    #[command(flatten)]
    directory: Directory,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// Removes a key for ever. What it signed opens no more.
///
/// Refused while sessions sign with it, and for the last key. With --force they get ESTALE for every handle that they were given,
/// and EOPNOTSUPP when they ask for more, until they are started again.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum keys retire 0011aaff")]
struct RetireArgs {
    /// The key.
    #[arg(value_name = "ID")]
    id: KeyId,
    /// Also if it is in use.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    directory: Directory,
    #[command(flatten)]
    users: Users,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Create(args) => create(args),
        Command::List(args) => list(args),
        Command::Check(args) => check(args),
        Command::Retire(args) => retire(args),
    }
}

fn create(args: &CreateArgs) -> anyhow::Result<ExitCode> {
    let directory = &args.directory.keys;
    let id = keys::create(directory)?;
    println!("{id}");
    let newest = Keys::read(directory)?.0.newest();
    if let Some(newest) = newest.filter(|newest| *newest != id) {
        eprintln!(
            "new sessions still sign with {newest}: its file is dated later than now; set its time with touch -d"
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn list(args: &ListArgs) -> anyhow::Result<ExitCode> {
    let (keys, faults) = Keys::read(&args.directory.keys)?;
    let users = args.users.read()?;
    let newest = keys.newest();
    let made = |key: &keys::Key| humantime::format_rfc3339_seconds(key.made).to_string();
    if args.json {
        let listed = keys.iter().map(|(id, key)| {
            json!({
                "id": id.to_string(), "made": made(key), "newest": newest == Some(id), "sessions": users.of(id),
            })
        });
        let listed = listed.collect::<Vec<_>>();
        println!("{}", json!({"keys": listed, "not_in_order": faults.len(), "unread": users.unread}));
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<9} {:<21} {:<7} SESSIONS", "KEY", "MADE", "");
    for (id, key) in keys.iter() {
        let note = if newest == Some(id) { "newest" } else { "" };
        println!("{:<9} {:<21} {note:<7} {}", id.to_string(), made(key), users.of(id).join(" "));
    }
    for fault in faults {
        eprintln!("not in order: {fault}");
    }
    for error in users.unread {
        eprintln!("a session that may sign with any of them: {error}");
    }
    Ok(ExitCode::SUCCESS)
}

fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let directory = &args.directory.keys;
    let (keys, faults) = Keys::read(directory)?;
    let is_good = faults.is_empty() && keys.newest().is_some();
    if args.json {
        let good = keys.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>();
        let faults = faults.iter().map(ToString::to_string).collect::<Vec<_>>();
        println!("{}", json!({"in_order": is_good, "keys": good, "faults": faults}));
        return Ok(ExitCode::from(u8::from(!is_good)));
    }
    for (id, _) in keys.iter() {
        println!("in order      {}", directory.join(format!("{id}.key")).display());
    }
    for fault in faults {
        println!("NOT in order  {fault}");
    }
    if keys.newest().is_none() {
        println!(
            "no key is in order in {}: handles are refused; `locum keys create` makes one",
            directory.display()
        );
    }
    Ok(ExitCode::from(u8::from(!is_good)))
}

fn retire(args: &RetireArgs) -> anyhow::Result<ExitCode> {
    let (directory, id) = (&args.directory.keys, args.id);
    let (keys, _) = Keys::read(directory)?;
    let path = directory.join(format!("{id}.key"));
    anyhow::ensure!(path.symlink_metadata().is_ok(), "there is no {}", path.display());
    let users = args.users.read()?;
    let sessions = users.of(id);
    for session in sessions {
        println!("{session} signs with {id}");
    }
    if !args.force {
        anyhow::ensure!(
            sessions.is_empty(),
            "{id} is in use by {} session(s), whose handles would all become ESTALE; end them first, or use --force",
            sessions.len()
        );
        anyhow::ensure!(
            users.unread.is_empty(),
            "a session may use {id}: {}; or use --force",
            users.unread.join("; ")
        );
        anyhow::ensure!(
            keys.iter().any(|(other, _)| other != id),
            "{id} would be the last key to go, and new sessions would be refused; `locum keys create` first, or use --force"
        );
    }
    keys::remove(directory, id)?;
    println!("{id} is retired: within a second nothing that it signed opens any more");
    Ok(ExitCode::SUCCESS)
}

impl Users {
    fn read(&self) -> anyhow::Result<KeyUsers> {
        let runtime_dir = RuntimeDir::new(&self.runtime_dir);
        KeyUsers::read(&runtime_dir).with_context(|| {
            format!("cannot tell which sessions {} has; are you root?", self.runtime_dir.display())
        })
    }
}
