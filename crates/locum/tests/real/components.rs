//! What `cargo xtask setup` has fetched, and what is made of it here.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// Runs to a good end and returns what was said.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn real() -> PathBuf {
    let real = std::env::var_os("LOCUM_REAL").expect("LOCUM_REAL is not set: run this with cargo xtask test");
    PathBuf::from(real)
}

pub(crate) fn virtiofsd() -> PathBuf {
    real().join("virtiofsd/bin/virtiofsd")
}

/// A system that can be booted.
pub(crate) fn systemd() -> PathBuf {
    real().join("systemd")
}

/// The guest's kernel.
pub(crate) fn vmlinuz() -> PathBuf {
    let boot = fs::read_dir(real().join("kernel/boot")).unwrap().map(|entry| entry.unwrap().path());
    boot.into_iter().find(|path| path.to_string_lossy().contains("/vmlinuz-")).unwrap()
}

/// Copies the kernel's modules of these names.
pub(crate) fn modules(names: &[&str], to: &Path) {
    let modules = real().join("kernel/lib/modules");
    for name in names {
        let name = format!("{name}.ko");
        let found = run(Command::new("find").arg(&modules).args(["-name", &name]));
        fs::copy(found.trim(), to.join(&name)).unwrap();
    }
}

/// Copies in another process: a child that another test starts meanwhile would inherit a descriptor for writing here, and until
/// it has let go of that the program cannot be started.
pub(crate) fn copy_program(from: &Path, to: &Path) {
    run(Command::new("cp").arg(from).arg(to));
}

/// A folder of commands: busybox by all its names, and `xattr`.
pub(crate) fn commands(to: &Path) {
    fs::create_dir_all(to).unwrap();
    let busybox = to.join("busybox");
    copy_program(Path::new("/bin/busybox"), &busybox);
    run(Command::new(&busybox).arg("--install").arg(to));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real/xattr.c");
    run(Command::new("cc").args(["-static", "-O", "-o"]).arg(to.join("xattr")).arg(source));
}

/// A private folder on a file system with handles, which others may enter.
pub(crate) fn folder() -> TempDir {
    folder_in("/var/tmp")
}

/// A private folder, which others may enter.
pub(crate) fn folder_in(parent: &str) -> TempDir {
    let folder = tempfile::tempdir_in(parent).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}
