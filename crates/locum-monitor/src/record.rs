//! What is kept on disk of a session, readable by root alone: all that must not change when another monitor takes over.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The record's version. One of another version is left untouched.
pub(crate) const VERSION: u32 = 1;

/// One session as it began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// [`VERSION`].
    pub(crate) version: u32,
    /// The boot in which the session began: nothing here means anything in another.
    pub(crate) boot: String,
    /// The container's id, as the runtime gave it.
    pub(crate) container: String,
    /// The policy's name.
    pub(crate) policy: String,
    /// The scope of its handles.
    pub(crate) scope: String,
    /// The id of the key that signs them; empty if none was there when the session began, and then none ever does.
    pub(crate) key: String,
    /// The rootless user at whose door it began.
    #[serde(default)]
    pub(crate) user: Option<u32>,
    /// The workload's first process, if it is known.
    pub(crate) process: Option<Process>,
    /// The pid namespace in which processes are so numbered: its inode. `None`: the release that wrote this did not say.
    #[serde(default)]
    pub(crate) namespace: Option<u64>,
    /// The first process's filters, if `locum attach` put the last one in.
    #[serde(default)]
    pub(crate) filters: Option<Filters>,
    /// The exports that were found.
    pub(crate) exports: Vec<FoundExport>,
}

/// A process, named so that no later owner of its id is taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its id in the monitor's pid namespace.
    pub(crate) pid: u32,
    /// When it started, in clock ticks since boot.
    pub(crate) start_time: u64,
}

/// The filters of a process, as `locum attach` left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// How many there were.
    pub count: usize,
    /// What the kernel counts of them.
    pub instructions: usize,
    /// The newest one's text.
    pub newest: String,
}

/// An export and the mount that it was found to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FoundExport {
    /// Its path in the policy.
    pub(crate) path: String,
    /// The mount's id that is never used twice (6.8), or the other one.
    pub(crate) mount: u64,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// The kernel's word.
    #[error("cannot {doing} the record {path}: {source}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not hold what a record holds.
    #[error(
        "{path} is not a record of version {VERSION}: {found}; it was left untouched: serve this session with the release that made it, or move the file away"
    )]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
}

impl Record {
    /// The record at `path`; `None` if there is none of this boot.
    pub(crate) fn read(path: &Path, boot: &str) -> Result<Option<Self>, RecordError> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => {
                text.map_err(|source| RecordError::File { doing: "read", path: path.to_owned(), source })?
            }
        };
        let foreign = |found: String| RecordError::Content { path: path.to_owned(), found };
        let head: Head = serde_json::from_slice(&text).map_err(|error| foreign(error.to_string()))?;
        if head.version != VERSION {
            return Err(foreign(format!("its version is {}", head.version)));
        }
        let record: Self = serde_json::from_slice(&text).map_err(|error| foreign(error.to_string()))?;
        Ok((record.boot == boot).then_some(record))
    }

    /// Writes the record to `path`, whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> Result<(), RecordError> {
        write_whole(self, path).map_err(|source| RecordError::File {
            doing: "write",
            path: path.to_owned(),
            source,
        })
    }
}

/// Writes `what` to `path` for root alone, whole or not at all.
pub(crate) fn write_whole(what: &impl Serialize, path: &Path) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&fresh)?.write_all(&serde_json::to_vec_pretty(what)?)?;
    fs::rename(&fresh, path)
}

/// Our own pid namespace: its inode.
pub(crate) fn pid_namespace() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(fs::metadata("/proc/self/ns/pid")?.ino())
}

/// The id of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_0_1_0_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        fs::write(&path, include_str!("frozen/0.1.0/record.json")).unwrap();
        let wanted = Record {
            version: 1,
            boot: "0b5e7a6c-1111-2222-3333-444455556666".into(),
            container: "virt-launcher".into(),
            policy: "virtiofsd".into(),
            scope: "virt-launcher".into(),
            key: "0011aaff".into(),
            user: Some(1000),
            process: Some(Process { pid: 4711, start_time: 987_654 }),
            namespace: None,
            filters: None,
            exports: vec![FoundExport { path: "/share".into(), mount: 2_147_484_000 }],
        };
        assert_eq!(Record::read(&path, &wanted.boot).unwrap(), Some(wanted));
    }

    #[test]
    fn a_record_is_read_back_in_its_boot_only_and_a_newer_one_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        assert_eq!(Record::read(&path, "b").unwrap(), None);
        let record = Record {
            version: VERSION,
            boot: "b".into(),
            container: "c".into(),
            policy: "p".into(),
            scope: "s".into(),
            key: "00000001".into(),
            user: None,
            process: Some(Process { pid: 1, start_time: 2 }),
            namespace: Some(4_026_531_836),
            filters: Some(Filters { count: 2, instructions: 40, newest: "0015".into() }),
            exports: vec![FoundExport { path: "/share".into(), mount: 3 }],
        };
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path, "b").unwrap(), Some(record.clone()));
        assert_eq!(Record::read(&path, "another").unwrap(), None);
        for text in ["{\"version\":2,\"more\":1}", "{\"version\":1}", "garbage", ""] {
            fs::write(&path, text).unwrap();
            assert!(matches!(Record::read(&path, "b"), Err(RecordError::Content { .. })), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
