//! `locum status`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use locum_journal::{Counters, Journal, Totals};
use locum_keeper::protocol::{Report, SessionReport};
use locum_keeper::{RuntimeDir, client};
use locum_kernel::process::Thread;
use locum_kernel::verdict;
use locum_monitor::reattach;
use locum_policy::Metadata;

use super::attach;

/// Who is served, what was refused, which monitor answers. Needs root.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum status --json")]
pub(crate) struct Args {
    /// Where the keeper works.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// For programs.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    let status = client::status(&runtime_dir, false).with_context(|| {
        format!(
            "cannot ask the keeper in {}; is `locum serve` running there, and are you root?",
            args.runtime_dir.display()
        )
    })?;
    if args.json {
        println!("{}", json(&runtime_dir, &status));
    } else {
        print(&runtime_dir, &status);
    }
    Ok(ExitCode::SUCCESS)
}

fn json(runtime_dir: &RuntimeDir, status: &Report) -> serde_json::Value {
    let sessions: Vec<_> = status.sessions.iter().map(|session| session_json(runtime_dir, session)).collect();
    serde_json::json!({
        "keeper": {"pid": status.keeper.pid, "version": status.keeper.version},
        "monitor": status.monitor,
        "sessions": sessions,
        "turned_away": status.keeper.turned_away,
    })
}

fn session_json(runtime_dir: &RuntimeDir, session: &SessionReport) -> serde_json::Value {
    let totals = totals(runtime_dir, session);
    serde_json::json!({
        "id": session.id,
        "container": session.container,
        "policy": policy(session),
        "pid": session.pid,
        "listeners": session.listeners,
        "calls": totals.calls,
        "refused": totals.refused,
        "recovered": totals.recovered,
        "reattached": totals.reattached,
        "abandoned": totals.abandoned,
        "filters_left": filters_left(runtime_dir, session),
    })
}

fn print(runtime_dir: &RuntimeDir, status: &Report) {
    println!("keeper   pid {}, release {}", status.keeper.pid, status.keeper.version);
    match &status.monitor {
        Some(monitor) => {
            println!(
                "monitor  pid {}, release {}, generation {}",
                monitor.pid, monitor.version, monitor.generation
            );
        }
        None => println!("monitor  none: calls wait until one comes"),
    }
    if status.keeper.turned_away > 0 {
        println!("turned away at the doors: {}", status.keeper.turned_away);
    }
    println!();
    println!(
        "{:<40} {:<16} {:>9} {:>12} {:>9} {:>9} {:>9} {:>12}",
        "SESSION", "POLICY", "LISTENERS", "CALLS", "REFUSED", "RECOVERED", "ABANDONED", "FILTERS LEFT"
    );
    for session in &status.sessions {
        let totals = totals(runtime_dir, session);
        println!(
            "{:<40} {:<16} {:>9} {:>12} {:>9} {:>9} {:>9} {:>12}",
            session.id.to_string(),
            policy(session).unwrap_or_else(|| "-".to_owned()),
            session.listeners,
            totals.calls,
            totals.refused,
            totals.recovered,
            totals.abandoned,
            filters_left(runtime_dir, session).map_or_else(|| "-".to_owned(), |left| left.to_string())
        );
    }
}

fn policy(session: &SessionReport) -> Option<String> {
    session.metadata.as_deref()?.parse().ok().map(|metadata: Metadata| metadata.policy)
}

/// How many more filters fit into the session's first process at least: each attach puts one in, and none ever leaves. `None`:
/// the process is not known, or has ended.
fn filters_left(runtime_dir: &RuntimeDir, session: &SessionReport) -> Option<usize> {
    let now = Thread::hold(session.pid).and_then(|process| process.status()).ok()?.filters;
    let known = reattach::filters(&runtime_dir.sessions().join(session.id.to_string()));
    let (count, instructions) = known.map_or((0, 0), |known| (known.count, known.instructions));
    Some(verdict::room(instructions, now.saturating_sub(count), attach::longest()))
}

/// The session's counters. One that no monitor has seen yet has none.
fn totals(runtime_dir: &RuntimeDir, session: &SessionReport) -> Totals {
    let path = runtime_dir.sessions().join(session.id.to_string()).join("journal");
    Journal::open_existing(&path)
        .map_or_else(|_| Totals::default(), |journal| Counters::of(&journal).totals())
}
