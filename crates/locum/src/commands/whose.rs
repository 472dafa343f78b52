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
    /// A surgeon was killed when it had put it in, and the process itself has it, alone.
    LeftBehind(Listener),
    /// It is not ours, or nothing says that it is.
    Foreign(String),
}

/// Of `process`, for which a listener is in force and which is under `filters`. Ours are those that the process `keeper` holds, for
/// `sessions`; its filters are from `origin`.
pub(crate) fn whose(
    process: &Thread,
    filters: &InForce,
    (keeper, sessions, origin): (&Thread, &[SessionReport], Origin),
) -> Result<Whose, Errno> {
    let origins = filters.origins();
    if !origins.is_empty() && origins.iter().all(|from| from.is_some_and(|from| from != origin)) {
        return Ok(Whose::Foreign(format!("that of another locum{}", told(&holders(keeper)?.strangers))));
    }
    let is_served = is_of_a_session(process, sessions)?;
    if origins.first() == Some(&Some(origin)) && !is_served {
        let mut own = Vec::new();
        for listener in process.listeners()? {
            if !listener.has_ended() && keeper.find(listener.as_fd())?.is_none() {
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
    if is_served || (!origins.is_empty() && origins.iter().all(|from| *from == Some(origin))) {
        return Ok(Whose::Kept);
    }
    let holders = holders(keeper)?;
    if holders.keeper && holders.strangers.is_empty() {
        return Ok(Whose::Kept);
    }
    Ok(Whose::Foreign(format!("not one of this keeper's{}", told(&holders.strangers))))
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
        if process.listeners().unwrap_or_default().iter().any(is_strange) {
            found.strangers.push((pid, process.name().unwrap_or_default()));
        }
    }
    Ok(found)
}
