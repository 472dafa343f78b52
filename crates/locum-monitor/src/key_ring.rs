//! The keys of a running monitor. The directory is the truth: what a file there says now is what the next monitor would
//! find, so a key whose file is gone or not in order signs and verifies nothing until it is right again. Only what says
//! nothing of the file, such as a table of descriptors that is full, leaves a key as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::keys::{self, KeyError, KeyId, Keys, Secret};
use crate::session::lock;

/// How often the directory is looked at. A session that begins looks by itself.
const LOOK: Duration = Duration::from_secs(1);

/// All keys of this host, as they are now.
#[derive(Debug)]
pub(crate) struct KeyRing {
    directory: PathBuf,
    current: Mutex<Arc<Keys>>,
    seen: Mutex<Seen>,
}

/// What this monitor has seen and said.
#[derive(Default)]
struct Seen {
    /// Every key that was ever in order: an id does not change its bytes.
    secrets: BTreeMap<KeyId, Secret>,
    faults: Vec<String>,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seen").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl KeyRing {
    /// The keys in `directory`; makes the directory, and one key, if there is none. Files that are not in order are told
    /// in the log.
    pub(crate) fn open(directory: &Path) -> Result<Self, KeyError> {
        let is_empty = match Keys::read(directory) {
            Ok((keys, faults)) => keys.newest().is_none() && faults.is_empty(),
            Err(KeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        if is_empty {
            let key = keys::create(directory)?;
            tracing::info!(%key, directory = %directory.display(), "made the first key");
        }
        let ring =
            Self { directory: directory.to_owned(), current: Mutex::default(), seen: Mutex::default() };
        ring.look();
        Ok(ring)
    }

    /// The keys as they were when it was last looked.
    pub(crate) fn current(&self) -> Arc<Keys> {
        Arc::clone(&lock(&self.current))
    }

    /// Looks at the directory, tells what has changed there, and returns the keys as they are now.
    pub(crate) fn look(&self) -> Arc<Keys> {
        // One look at a time: a later one must not be overtaken by what an earlier one found.
        let mut seen = lock(&self.seen);
        let before = self.current();
        let (mut now, mut faults) = Keys::read(&self.directory).unwrap_or_else(|error| {
            let left = if error.is_passing() { Keys::clone(&before) } else { Keys::default() };
            (left, vec![error])
        });
        for id in faults.iter().filter(|fault| fault.is_passing()).filter_map(KeyError::id) {
            now.0.extend(before.get(id).map(|key| (id, key.clone())));
        }
        now.0.retain(|id, key| {
            let is_same = seen.secrets.entry(*id).or_insert_with(|| key.secret.clone()) == &key.secret;
            if !is_same {
                faults.push(KeyError::Changed(self.directory.join(format!("{id}.key"))));
            }
            is_same
        });
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        for fault in faults.iter().filter(|fault| !seen.faults.contains(fault)) {
            tracing::error!("a key that is not in order, it signs and verifies nothing: {fault}");
        }
        seen.faults = faults;
        let ids = |keys: &Keys| keys.iter().map(|(id, key)| (id, key.made)).collect::<BTreeMap<_, _>>();
        if ids(&before) == ids(&now) {
            return before;
        }
        for (id, _) in now.iter().filter(|(id, _)| before.get(*id).is_none()) {
            tracing::info!(key = %id, "a key has come");
        }
        for (id, _) in before.iter().filter(|(id, _)| now.get(*id).is_none()) {
            tracing::warn!(
                key = %id,
                "a key is gone, what it signed verifies no more; sessions that sign with it get EOPNOTSUPP for names"
            );
        }
        if let Some(newest) = now.newest() {
            tracing::info!(key = %newest, "signs for sessions that begin from now on");
        } else {
            let directory = self.directory.display();
            tracing::error!(%directory, "no key is in order, handles are refused: `locum keys create` makes one");
        }
        let now = Arc::new(now);
        *lock(&self.current) = Arc::clone(&now);
        now
    }

    /// Looks at the directory for as long as the process lives. In a thread of its own, so that a file system which does not
    /// answer delays nobody.
    pub(crate) fn keep_looking(&self) -> ! {
        loop {
            std::thread::sleep(LOOK);
            self.look();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    fn write(path: &Path, bytes: &[u8]) {
        use std::io::Write as _;
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(path).unwrap().write_all(bytes).unwrap();
    }

    #[test]
    fn the_first_use_makes_one_key_and_the_next_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("a/keys");
        let newest = || KeyRing::open(&directory).unwrap().current().newest().unwrap();
        assert_eq!(newest(), newest());
    }

    #[test]
    fn no_key_is_made_beside_one_that_is_not_in_order() {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("0011aaff.key"), &[7; 5]);
        assert_eq!(KeyRing::open(folder.path()).unwrap().current().newest(), None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_directory_is_the_truth() {
        let folder = tempfile::tempdir().unwrap();
        let ring = KeyRing::open(folder.path()).unwrap();
        let first = ring.current().newest().unwrap();
        let path = folder.path().join("0011aaff.key");
        let id: KeyId = "0011aaff".parse().unwrap();
        let has = || ring.look().get(id).is_some();
        // As cp(1) writes it.
        for len in [0, 5, 31] {
            write(&path, &vec![7; len]);
            assert!(!has(), "{len} bytes");
        }
        write(&path, &[7; 32]);
        assert!(has());
        assert_eq!(ring.current().newest(), Some(id));
        write(&path, &[8; 32]);
        assert!(!has(), "an id names other bytes than before");
        assert_eq!(ring.current().newest(), Some(first));
        write(&path, &[7; 32]);
        assert!(has());
        std::fs::remove_file(&path).unwrap();
        assert!(!has());
        std::fs::remove_dir_all(folder.path()).unwrap();
        assert_eq!(ring.look().newest(), None);
        assert!(!folder.path().exists(), "a running monitor makes none");
    }
}
