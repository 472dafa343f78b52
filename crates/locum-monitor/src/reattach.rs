//! Sessions whose listener is lost: nobody holds it, and the workload lives. Putting another listener in is the work of a
//! short-lived program, the surgeon, `locum attach --lost`, which needs more rights than a monitor and may not be under a filter.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use locum_keeper::RuntimeDir;
use locum_kernel::credentials;
use locum_kernel::process::Thread;

use serde::{Deserialize, Serialize};

use crate::Shared;
pub use crate::record::Filters;
use crate::record::{Record, boot_id, pid_namespace};

/// Where [`Told`] stands among a container's annotations. It is believed at root's door only.
pub const ANNOTATION: &str = "locum.attached";

/// What `locum attach` says of a listener, beside what a runtime says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Told {
    /// The process's filters, with ours.
    pub filters: Option<Filters>,
    /// Whether its calls are to run unhelped, as they did when the listener was lost.
    pub detached: bool,
}

/// A session that was served once, from its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Its folder.
    pub folder: PathBuf,
    /// Its id.
    pub id: String,
    /// The container's id.
    pub container: String,
    /// The policy's name.
    pub policy: String,
    /// The id of the key that signed its handles; `None` if there was none when it began.
    pub key: Option<String>,
    /// The workload's first process, which lives.
    pub process: u32,
    /// Its filters, if `locum attach` put the last one in.
    pub filters: Option<Filters>,
    /// Whether its calls ran unhelped, since somebody wished so.
    pub detached: bool,
}

/// Every session in `runtime_dir` whose first process lives, and which root's runtime began: a rootless user's has to be begun
/// at its own door.
pub fn on_disk(runtime_dir: &RuntimeDir) -> std::io::Result<Vec<Lost>> {
    let boot = boot_id()?;
    let folders = std::fs::read_dir(runtime_dir.sessions())?;
    Ok(folders.filter_map(|folder| read(&folder.ok()?.path(), &boot)).collect())
}

fn read(folder: &Path, boot: &str) -> Option<Lost> {
    let record = Record::read(&folder.join("record.json"), boot).ok()??;
    let process = record.process.as_ref().filter(|_| record.user.is_none())?;
    // Elsewhere another process may be so numbered, and have started at the same time.
    if record.namespace.is_some_and(|namespace| pid_namespace().ok() != Some(namespace)) {
        return None;
    }
    let lives = Thread::hold(process.pid).and_then(|held| held.start_time()) == Ok(process.start_time);
    lives.then(|| Lost {
        folder: folder.to_owned(),
        id: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        container: record.container.clone(),
        policy: record.policy.clone(),
        key: Some(record.key).filter(|key| !key.is_empty()),
        process: process.pid,
        filters: record.filters.clone(),
        detached: folder.join("detached").exists(),
    })
}

/// The filters of the first process of the session in `folder`, if `locum attach` put the last one in.
pub fn filters(folder: &Path) -> Option<Filters> {
    Record::read(&folder.join("record.json"), &boot_id().ok()?).ok()??.filters
}

/// Has the surgeon see to the sessions `ids`, if any of their workloads live.
pub(crate) fn begin(shared: &Shared, ids: &[String]) {
    let folder = |id: &String| shared.folder(id);
    if !ids.iter().any(|id| read(&folder(id), &shared.boot).is_some()) {
        return;
    }
    tracing::warn!(sessions = ?ids, "listeners are lost; putting others in");
    let mut surgeon = Command::new("/proc/self/exe");
    surgeon.args(["attach", "--lost", "--runtime-dir"]).arg(shared.runtime_dir.path());
    surgeon.stdin(Stdio::null()).stdout(Stdio::null());
    credentials::as_surgeon(&mut surgeon);
    match surgeon.spawn() {
        Ok(mut surgeon) => {
            // It is awaited beside our own work: what it attaches comes to us by way of the keeper.
            std::thread::spawn(move || surgeon.wait());
        }
        Err(error) => tracing::error!("cannot start the surgeon, lost listeners stay lost: {error}"),
    }
}
