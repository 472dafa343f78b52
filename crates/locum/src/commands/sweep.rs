//! `locum sweep`: removes what `locum run` made, when that has ended in whatever way.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;

/// For `locum run`: waits for the end of standard input, then removes PATHs.
#[derive(clap::Args)]
pub(crate) struct Args {
    paths: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // The other end closes when `locum run` ends, however it does.
    io::copy(&mut io::stdin(), &mut io::sink())?;
    for path in &args.paths {
        remove(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Keeper and monitor die with `locum run`, but nothing tells when they are gone; until then they may still make a file.
fn remove(path: &Path) -> io::Result<()> {
    for _ in 0..200 {
        let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            removed => return removed,
        }
    }
    Ok(())
}

/// Removes its paths when it is dropped, or when this process dies.
pub(crate) struct Sweeper(Child);

impl Sweeper {
    /// Has `paths`, which need not be there yet, removed at the end.
    pub(crate) fn start(paths: &[&Path]) -> anyhow::Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new("/proc/self/exe");
        command.arg("sweep").args(paths).stdin(Stdio::piped()).stdout(Stdio::null());
        // In a group of its own: a signal from the terminal is not for it.
        let child = command.process_group(0).spawn().context("cannot start the process that cleans up")?;
        Ok(Self(child))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            tracing::warn!("cleaning up: {error}");
        }
    }
}
