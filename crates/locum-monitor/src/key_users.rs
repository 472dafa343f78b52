//! Which sessions sign with which key, as their records say.

use std::collections::BTreeMap;
use std::io;

use locum_keeper::RuntimeDir;

use crate::keys::KeyId;
use crate::record::{Record, boot_id};

/// Sessions by the key that signs for them.
#[derive(Clone, Debug, Default)]
pub struct KeyUsers {
    sessions: BTreeMap<KeyId, Vec<String>>,
    /// What is wrong with records that cannot be read: their sessions may use any key.
    pub unread: Vec<String>,
}

impl KeyUsers {
    /// Those of every session in `runtime_dir` that began in this boot.
    pub fn read(runtime_dir: &RuntimeDir) -> io::Result<Self> {
        let boot = boot_id()?;
        let folders = match std::fs::read_dir(runtime_dir.sessions()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            folders => folders?,
        };
        let mut users = Self::default();
        for folder in folders {
            let folder = folder?;
            match Record::read(&folder.path().join("record.json"), &boot) {
                Ok(None) => {}
                Ok(Some(record)) => {
                    let name = folder.file_name().to_string_lossy().into_owned();
                    let key = record.key.parse().into_iter();
                    key.for_each(|key| users.sessions.entry(key).or_default().push(name.clone()));
                }
                Err(error) => users.unread.push(error.to_string()),
            }
        }
        Ok(users)
    }

    /// The sessions that sign with `key`.
    pub fn of(&self, key: KeyId) -> &[String] {
        self.sessions.get(&key).map_or(&[], Vec::as_slice)
    }
}
