//! Where everything is.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};

/// The runtime directory: sockets, journals, policies of `locum run`. On a tmpfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// The one at `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its own path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where root's container runtimes deliver listeners.
    pub fn front_door(&self) -> PathBuf {
        self.0.join("oci.sock")
    }

    /// Where the runtimes of the rootless user `uid` deliver listeners.
    pub fn user_door(&self, uid: u32) -> PathBuf {
        self.0.join(format!("oci-{uid}.sock"))
    }

    /// Where monitors and `locum status` talk to the keeper.
    pub fn control(&self) -> PathBuf {
        self.0.join("keeper.sock")
    }

    /// The file that a living keeper holds locked.
    pub fn lock(&self) -> PathBuf {
        self.0.join("keeper.lock")
    }

    /// A directory for each session, with its journal.
    pub fn sessions(&self) -> PathBuf {
        self.0.join("sessions")
    }

    /// The file that says that the calls of a session run unhelped, for as long as it is there.
    pub fn detached(&self, session: &str) -> PathBuf {
        self.sessions().join(session).join("detached")
    }

    /// Policies beside those that a monitor was started with, one file each.
    pub fn policies(&self) -> PathBuf {
        self.0.join("policies")
    }

    /// Makes what is missing: rootless users must reach their doors, nobody but root the rest. A directory in which others
    /// could put things is refused.
    pub fn prepare(&self) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.0)?;
        let found = std::fs::metadata(&self.0)?;
        let (owner, us) = (found.uid(), rustix::process::geteuid().as_raw());
        if owner != us || found.mode() & 0o022 != 0 {
            let mode = found.mode() & 0o7777;
            return Err(io::Error::other(format!(
                "wanted a directory of user {us} that no other may write to, found one of user {owner} with mode {mode:o}"
            )));
        }
        // Whatever the umask; and temporary directories are 0700.
        std::fs::set_permissions(&self.0, PermissionsExt::from_mode(0o755))?;
        for path in [self.sessions(), self.policies()] {
            match std::fs::DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}
