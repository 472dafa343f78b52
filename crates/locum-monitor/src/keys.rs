//! The keys that sign handles, on disk: a directory with one file for each, `ID.key`, 32 random bytes that root alone can
//! read. An id names the same bytes for ever, on every host.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use locum_kernel::Errno;

/// Bytes in a key.
const KEY_BYTES: usize = 32;
/// So many zeros in a row are a hole in a file, and no chance.
const HOLE: usize = 8;

/// Names a key: the eight hexadecimal digits of its file's name. It travels in every handle that the key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub(crate) [u8; 4]);

/// What names no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted the eight lower-case hexadecimal digits of a key's id")]
pub struct NotAKeyId;

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

impl std::str::FromStr for KeyId {
    type Err = NotAKeyId;

    fn from_str(text: &str) -> Result<Self, NotAKeyId> {
        let digits = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 8 || !text.bytes().all(digits) {
            return Err(NotAKeyId);
        }
        u32::from_str_radix(text, 16).map(|id| Self(id.to_be_bytes())).map_err(|_| NotAKeyId)
    }
}

/// What is wrong with a key. Never a reason to sign with another, or with none.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The kernel's word on the directory or a file in it.
    #[error("cannot {doing} {path}: {source}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A name that is no key id.
    #[error(
        "{0}: wanted a name of eight lower-case hexadecimal digits and .key; rename it, or move it out of the directory"
    )]
    Name(PathBuf),
    /// A key that others can read or change.
    #[error(
        "{path}: wanted a regular file of root with mode 0600, found mode {mode:04o} and owner {owner}; if anyone may have \
         read it, they can forge handles: replace the key; else chmod 600 and chown root it"
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its user id.
        owner: u32,
    },
    /// A key of another length.
    #[error("{path}: wanted {KEY_BYTES} bytes, found {found}; restore it from where it came, or remove it")]
    Length {
        /// Which file.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// A file of the right length that was not written to its end.
    #[error(
        "{0}: wanted {KEY_BYTES} random bytes, found {HOLE} zeros in a row; restore it from where it came, or remove it"
    )]
    Hole(PathBuf),
    /// Other bytes under the same id.
    #[error(
        "{0}: wanted the bytes that this monitor has read there before, found others; restore them, and give another key \
         another name"
    )]
    Changed(PathBuf),
}

impl KeyError {
    /// Whether it says something of this process at this moment, and nothing of the file.
    pub(crate) fn is_passing(&self) -> bool {
        let Self::File { source, .. } = self else { return false };
        let error = Errno::from_io_error(source);
        matches!(error, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::INTR))
    }

    /// The key that it is about.
    pub(crate) fn id(&self) -> Option<KeyId> {
        let (Self::File { path, .. }
        | Self::Name(path)
        | Self::Exposed { path, .. }
        | Self::Length { path, .. }
        | Self::Hole(path)
        | Self::Changed(path)) = self;
        id_of(path)
    }
}

/// A key's bytes. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(pub(crate) [u8; KEY_BYTES]);

/// A key whose file is in order.
#[derive(Clone)]
pub struct Key {
    pub(crate) secret: Secret,
    /// When its file was last written.
    pub made: SystemTime,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("made", &self.made).finish_non_exhaustive()
    }
}

/// The keys of this host that are in order.
#[derive(Clone, Debug, Default)]
pub struct Keys(pub(crate) BTreeMap<KeyId, Key>);

impl Keys {
    /// Reads every key in `directory`, and tells what is wrong with each file that is not in order.
    pub fn read(directory: &Path) -> Result<(Self, Vec<KeyError>), KeyError> {
        let (mut keys, mut faults) = (BTreeMap::new(), Vec::new());
        for entry in fs::read_dir(directory).map_err(failed("list", directory))? {
            let path = entry.map_err(failed("list", directory))?.path();
            // What a creation that was cut off leaves behind.
            if path.extension().is_some_and(|extension| extension == "new") {
                continue;
            }
            match read(&path) {
                Ok((id, key)) => drop(keys.insert(id, key)),
                // Retired between the two looks.
                Err(KeyError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(fault) => faults.push(fault),
            }
        }
        Ok((Self(keys), faults))
    }

    /// The key that signs for sessions which begin now and name none.
    pub fn newest(&self) -> Option<KeyId> {
        self.0.iter().max_by_key(|(id, key)| (key.made, **id)).map(|(id, _)| *id)
    }

    /// Every key, by its id.
    pub fn iter(&self) -> impl Iterator<Item = (KeyId, &Key)> {
        self.0.iter().map(|(id, key)| (*id, key))
    }

    /// The key `id`.
    pub fn get(&self, id: KeyId) -> Option<&Key> {
        self.0.get(&id)
    }
}

fn id_of(path: &Path) -> Option<KeyId> {
    path.extension().filter(|extension| *extension == "key")?;
    path.file_stem()?.to_str()?.parse().ok()
}

fn read(path: &Path) -> Result<(KeyId, Key), KeyError> {
    let id = id_of(path).ok_or_else(|| KeyError::Name(path.to_owned()))?;
    let nofollow = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nofollow.bits().cast_signed())
        .open(path)
        .map_err(failed("open", path))?;
    let metadata = file.metadata().map_err(failed("look at", path))?;
    if !metadata.is_file()
        || metadata.mode() & 0o077 != 0
        || metadata.uid() != rustix::process::geteuid().as_raw()
    {
        return Err(KeyError::Exposed {
            path: path.to_owned(),
            mode: metadata.mode() & 0o7777,
            owner: metadata.uid(),
        });
    }
    // What is read counts, not what the length was before.
    let mut bytes = Vec::with_capacity(KEY_BYTES + 1);
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    let found = metadata.len().max(bytes.len() as u64);
    let secret = <[u8; KEY_BYTES]>::try_from(bytes);
    let secret = secret.map_err(|_| KeyError::Length { path: path.to_owned(), found })?;
    if secret.windows(HOLE).any(|window| window == [0; HOLE]) {
        return Err(KeyError::Hole(path.to_owned()));
    }
    let made = metadata.modified().map_err(failed("look at", path))?;
    Ok((id, Key { secret: Secret(secret), made }))
}

/// Makes a new key in `directory`, and the directory if it is not there. It is there whole or not at all.
pub fn create(directory: &Path) -> Result<KeyId, KeyError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("make", directory))?;
    let mut random = [0; 4 + KEY_BYTES];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .map_err(failed("read", Path::new("/dev/urandom")))?;
    let (id, secret) = random.split_at(4);
    let id = KeyId([id[0], id[1], id[2], id[3]]);
    let path = path(directory, id);
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(failed("make", &fresh))?;
    file.write_all(secret).and_then(|()| file.sync_all()).map_err(failed("write", &fresh))?;
    // An id that is in use, whatever the chance, is not replaced, as a rename would.
    let made = fs::hard_link(&fresh, &path).map_err(failed("make", &path));
    fs::remove_file(&fresh).map_err(failed("remove", &fresh))?;
    made?;
    sync(directory)?;
    Ok(id)
}

/// Removes the key `id` from `directory`, for ever.
pub fn remove(directory: &Path, id: KeyId) -> Result<(), KeyError> {
    let path = path(directory, id);
    fs::remove_file(&path).map_err(failed("remove", &path))?;
    sync(directory)
}

fn path(directory: &Path, id: KeyId) -> PathBuf {
    directory.join(format!("{id}.key"))
}

fn sync(directory: &Path) -> Result<(), KeyError> {
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("write", directory))
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    move |source| KeyError::File { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_new_key_is_private_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("a/keys");
        let id = create(&directory).unwrap();
        let (keys, faults) = Keys::read(&directory).unwrap();
        assert!(faults.is_empty());
        assert_eq!(keys.newest(), Some(id));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join(format!("{id}.key"))), 0o600);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        remove(&directory, id).unwrap();
        assert_eq!(Keys::read(&directory).unwrap().0.newest(), None);
        assert!(remove(&directory, id).unwrap_err().to_string().contains(&format!("{id}.key")));
    }

    type Is = fn(&KeyError) -> bool;

    #[test]
    fn a_key_that_cannot_be_trusted_is_not_one_and_the_error_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let good = create(folder.path()).unwrap();
        let path = folder.path().join("0011aaff.key");
        let half = [[7; 16], [0; 16]].concat();
        let bad: [(&[u8], u32, Is); 6] = [
            (&[7; 31], 0o600, |error| matches!(error, KeyError::Length { found: 31, .. })),
            (&[7; 33], 0o600, |error| matches!(error, KeyError::Length { found: 33, .. })),
            (b"", 0o600, |error| matches!(error, KeyError::Length { found: 0, .. })),
            (&[0; 32], 0o600, |error| matches!(error, KeyError::Hole(_))),
            (&half, 0o600, |error| matches!(error, KeyError::Hole(_))),
            (&[7; 32], 0o640, |error| matches!(error, KeyError::Exposed { mode: 0o640, .. })),
        ];
        for (bytes, mode, is) in bad {
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let (keys, faults) = Keys::read(folder.path()).unwrap();
            assert!(faults.len() == 1 && is(&faults[0]), "{faults:?}");
            assert!(faults[0].to_string().contains("0011aaff.key"));
            assert_eq!(keys.iter().map(|(id, _)| id).collect::<Vec<_>>(), [good]);
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Keys::read(folder.path()).unwrap().0.get("0011aaff".parse().unwrap()).is_some());
        fs::rename(&path, folder.path().join("0011AAFF.key")).unwrap();
        std::os::unix::fs::symlink(folder.path().join(format!("{good}.key")), &path).unwrap();
        let (_, faults) = Keys::read(folder.path()).unwrap();
        assert!(faults.iter().any(|fault| matches!(fault, KeyError::Name(_))), "{faults:?}");
        assert!(faults.iter().any(|fault| fault.to_string().contains("0011aaff.key")), "{faults:?}");
    }
}
