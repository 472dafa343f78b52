//! The keys that sign handles: a directory with one file for each, `ID.key`, 32 bytes that root alone can read.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Bytes in a key.
const KEY_BYTES: usize = 32;

/// Names a key: the eight hexadecimal digits of its file's name. It travels in every handle that the key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub(crate) [u8; 4]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

impl std::str::FromStr for KeyId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let digits = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 8 || !text.bytes().all(digits) {
            return Err(());
        }
        u32::from_str_radix(text, 16).map(|id| Self(id.to_be_bytes())).map_err(|_| ())
    }
}

/// Why there are no keys to work with. Never a reason to sign with another, or with none.
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
        "{path}: wanted a regular file of root with mode 0600, found mode {mode:04o} and owner {owner}; anyone who read it can forge handles: replace the key"
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
    #[error("{path}: wanted {KEY_BYTES} bytes, found {found}; restore it from where it came")]
    Length {
        /// Which file.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
}

/// A key's bytes. Never shown.
#[derive(Clone)]
pub(crate) struct Secret(pub(crate) [u8; KEY_BYTES]);

/// All keys of this host.
pub struct Keys {
    secrets: BTreeMap<KeyId, Secret>,
    newest: KeyId,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("ids", &self.secrets.keys()).field("newest", &self.newest).finish()
    }
}

impl Keys {
    /// Reads every key in `directory`; makes the directory, and one key, if there is none.
    pub fn open(directory: &Path) -> Result<Self, KeyError> {
        if let Some(keys) = Self::read(directory)? {
            return Ok(keys);
        }
        create(directory)?;
        Self::read(directory)?.ok_or_else(|| KeyError::File {
            doing: "find the key just made in",
            path: directory.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// The key that signs for sessions which begin now and name none.
    pub fn newest(&self) -> KeyId {
        self.newest
    }

    pub(crate) fn secret(&self, id: KeyId) -> Option<&Secret> {
        self.secrets.get(&id)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (KeyId, &Secret)> {
        self.secrets.iter().map(|(id, secret)| (*id, secret))
    }

    fn read(directory: &Path) -> Result<Option<Self>, KeyError> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries.map_err(failed("list", directory))?,
        };
        let mut secrets = BTreeMap::new();
        let mut newest: Option<(SystemTime, KeyId)> = None;
        for entry in entries {
            let path = entry.map_err(failed("list", directory))?.path();
            // What a creation that was cut off leaves behind.
            if path.extension().is_some_and(|extension| extension == "new") {
                continue;
            }
            let (id, secret, made) = read_key(&path)?;
            secrets.insert(id, secret);
            newest = newest.max(Some((made, id)));
        }
        Ok(newest.map(|(_, newest)| Self { secrets, newest }))
    }
}

fn read_key(path: &Path) -> Result<(KeyId, Secret, SystemTime), KeyError> {
    let id = (path.extension().is_some_and(|extension| extension == "key"))
        .then(|| path.file_stem()?.to_str()?.parse().ok())
        .flatten()
        .ok_or_else(|| KeyError::Name(path.to_owned()))?;
    let nofollow = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let mut file = OpenOptions::new()
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
    if metadata.len() != KEY_BYTES as u64 {
        return Err(KeyError::Length { path: path.to_owned(), found: metadata.len() });
    }
    let mut secret = [0; KEY_BYTES];
    file.read_exact(&mut secret).map_err(failed("read", path))?;
    Ok((id, Secret(secret), metadata.modified().map_err(failed("look at", path))?))
}

fn create(directory: &Path) -> Result<(), KeyError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("make", directory))?;
    let mut random = [0; 4 + KEY_BYTES];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .map_err(failed("read", Path::new("/dev/urandom")))?;
    let (id, secret) = random.split_at(4);
    let id = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
    let path = directory.join(format!("{id:08x}.key"));
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(failed("make", &fresh))?;
    file.write_all(secret).and_then(|()| file.sync_all()).map_err(failed("write", &fresh))?;
    fs::rename(&fresh, &path).map_err(failed("rename", &fresh))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("write", directory))?;
    tracing::info!(key = format!("{id:08x}"), directory = %directory.display(), "made the first key");
    Ok(())
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    move |source| KeyError::File { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_first_use_makes_one_key_and_the_next_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("a/keys");
        let first = Keys::open(&directory).unwrap();
        let again = Keys::open(&directory).unwrap();
        assert_eq!(first.newest(), again.newest());
        assert_eq!(first.secret(first.newest()).unwrap().0, again.secret(first.newest()).unwrap().0);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join(format!("{}.key", first.newest()))), 0o600);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    #[test]
    fn a_key_that_cannot_be_trusted_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0011aaff.key");
        let with = |bytes: &[u8], mode| {
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Keys::open(folder.path())
        };
        assert_eq!(with(&[7; 32], 0o600).unwrap().newest().to_string(), "0011aaff");
        assert!(matches!(with(&[7; 31], 0o600), Err(KeyError::Length { found: 31, .. })));
        assert!(matches!(with(b"", 0o600), Err(KeyError::Length { found: 0, .. })));
        assert!(matches!(with(&[7; 32], 0o640), Err(KeyError::Exposed { mode: 0o640, .. })));
        fs::rename(&path, folder.path().join("0011AAFF.key")).unwrap();
        assert!(matches!(Keys::open(folder.path()), Err(KeyError::Name(_))));
    }
}
