//! Whose listener is in force for a process. The kernel does not say which filter a listener belongs to; so the filters are asked,
//! those that `locum attach` put in say where it worked, and failing that whoever holds listeners.

use std::collections::HashSet;
use std::os::fd::AsFd as _;

use locum_keeper::protocol::SessionReport;
use locum_kernel::Errno;
use locum_kernel::filter::Origin;
use locum_kernel::notify::Listener;
use locum_kernel::process::Thread;
use locum_kernel::verdict::InForce;

use super::processes;

/// The answer.
pub(crate) enum Whose {
    /// Our keeper has it.
    Kept,
    /// The process itself has it and nobody else: a surgeon was killed when it had put it in, or it is a lifeline.
    LeftBehind(Listener),
    /// It is not ours, or nothing says that it is.
    Foreign(String),
}

/// Of `process`, for which a listener is in force and which is under `filters`; they hand over what a filter of ours would, or do not.
/// Ours are the listeners that the process `keeper` holds, for `sessions`; its filters are from `origin`.
pub(crate) fn whose(
    process: &Thread,
    (filters, hand_over): (&InForce, bool),
    (keeper, sessions, origin): (&Thread, &[SessionReport], Origin),
) -> anyhow::Result<Whose> {
    let origins = filters.origins();
    let is_served = is_of_a_session(process, sessions)?;
    if !is_served && (hand_over || origins.first() == Some(&Some(origin))) {
        let mut own = Vec::new();
        for listener in process.listeners()? {
            if !listener.has_ended()
                && keeper.find(listener.as_fd())?.is_none()
                && !is_held_elsewhere(&listener, process)?
            {
                own.push(listener);
            }
        }
        match own.len() {
            0 => {}
            1 => return Ok(own.pop().map_or(Whose::Kept, Whose::LeftBehind)),
            count => {
                return Ok(Whose::Foreign(format!(
                    "one of {count} that it has in its table, and nothing tells which: have it close those of others"
                )));
            }
        }
    }
    if !origins.is_empty() && origins.iter().all(|from| from.is_some_and(|from| from != origin)) {
        return Ok(Whose::Foreign(format!("that of another locum{}", told(&holders(keeper)?.strangers))));
    }
    if is_served || (!origins.is_empty() && origins.iter().all(|from| *from == Some(origin))) {
        return Ok(Whose::Kept);
    }
    let holders = holders(keeper)?;
    if holders.keeper && holders.strangers.is_empty() {
        return Ok(Whose::Kept);
    }
    Ok(Whose::Foreign(format!("not one of this keeper's{}", told(&holders.strangers))))
}

/// Whether a process has it that is neither `process` nor comes from it.
fn is_held_elsewhere(listener: &Listener, process: &Thread) -> anyhow::Result<bool> {
    let all = processes::all()?;
    let pid = process.status()?.process;
    let family = processes::with_descendants(&[pid], &all);
    // What ends meanwhile has nothing.
    let has =
        |pid: &u32| Thread::hold(*pid).is_ok_and(|other| matches!(other.find(listener.as_fd()), Ok(Some(_))));
    Ok(all.iter().any(|pid| !family.contains(pid) && *pid != std::process::id() && has(pid)))
}

fn told(strangers: &[(u32, String)]) -> String {
    if strangers.is_empty() {
        return String::new();
    }
    let each: Vec<String> = strangers.iter().map(|(pid, name)| format!("{pid} ({name})")).collect();
    format!("; listeners that this keeper has not are held by process {}", each.join(", "))
}

/// Whether the process, or one that it comes from, is the first of a session, or in a session's container.
fn is_of_a_session(process: &Thread, sessions: &[SessionReport]) -> Result<bool, Errno> {
    let mut pid = process.status()?.process;
    if sessions.iter().any(|session| processes::is_in_container(pid, &session.container)) {
        return Ok(true);
    }
    while pid > 1 {
        if sessions.iter().any(|session| session.pid == pid) {
            return Ok(true);
        }
        // One that ends meanwhile has nobody below it any more.
        pid = Thread::hold(pid).and_then(|process| process.status()).map_or(0, |status| status.parent);
    }
    Ok(false)
}

/// Who holds listeners, of all processes that we see.
struct Holders {
    /// Whether the keeper does.
    keeper: bool,
    /// Those that hold one which the keeper has not, with their names.
    strangers: Vec<(u32, String)>,
}

fn holders(keeper: &Thread) -> Result<Holders, Errno> {
    let mut found = Holders { keeper: !keeper.listeners()?.is_empty(), strangers: Vec::new() };
    let mut seen = HashSet::from([keeper.tid(), std::process::id()]);
    for pid in processes::all().unwrap_or_default().into_iter().filter(|pid| seen.insert(*pid)) {
        let Ok(process) = Thread::hold(pid) else { continue };
        // Whoever ends while it is looked at holds nothing.
        let is_strange =
            |listener: &Listener| keeper.find(listener.as_fd()) == Ok(None) && !listener.has_ended();
        if process.listeners().is_ok_and(|listeners| listeners.iter().any(is_strange)) {
            found.strangers.push((pid, process.name().unwrap_or_default()));
        }
    }
    Ok(found)
}
