//! Where things are: `/run/locum`, or wherever `LOCUM_RUNTIME_DIR` says.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// The runtime directory. Root's alone to write; sockets in it can be reached by those who own them.
#[derive(Clone, Debug)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// The runtime directory at `path`, which need not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The front door of root's container runtimes.
    pub fn front_door(&self) -> PathBuf {
        self.0.join("oci.sock")
    }

    /// The front door of the user `uid`.
    pub fn user_door(&self, uid: u32) -> PathBuf {
        self.0.join(format!("oci-{uid}.sock"))
    }

    /// The control socket, for root.
    pub fn control(&self) -> PathBuf {
        self.0.join("keeper.sock")
    }

    /// One folder for each session, with its journal and record.
    pub fn sessions(&self) -> PathBuf {
        self.0.join("sessions")
    }

    /// Policies of single workloads, `NAME.toml`.
    pub fn policies(&self) -> PathBuf {
        self.0.join("policies")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.0.join("keeper.lock")
    }

    /// Makes what is missing of it.
    pub fn create(&self) -> io::Result<()> {
        let make = |path: &Path, mode| std::fs::DirBuilder::new().recursive(true).mode(mode).create(path);
        make(&self.0, 0o755)?;
        make(&self.sessions(), 0o700)?;
        make(&self.policies(), 0o700)
    }
}
