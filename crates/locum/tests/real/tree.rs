//! The work that the guest does, done on this machine, and the listing of what it leaves behind.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::components;

/// Everything there is to know of a tree: see list.sh.
pub(crate) type Listing = BTreeSet<String>;

/// A script beside this file.
pub(crate) fn script(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real")).join(name)
}

/// Makes the tar that the work unpacks.
pub(crate) fn pack(tar: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    components::run(Command::new("tar").arg("-C").arg(source).arg("-cf").arg(tar).args(["src", "tests"]));
}

/// Makes in `share`, for the user `owner`, what only the host's root can make or read.
pub(crate) fn special(share: &Path, owner: u32) {
    let folder = share.join("special");
    for folder in [&folder, &folder.join("inner")] {
        std::fs::create_dir(folder).unwrap();
        chown(folder, Some(owner), Some(owner)).unwrap();
    }
    let mode = Mode::from_raw_mode(0o600);
    for (name, kind, device) in [
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("loop", FileType::BlockDevice, makedev(7, 0)),
        ("pipe", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
    ] {
        mknodat(CWD, folder.join(name), kind, mode, device).unwrap();
    }
    symlink("/nowhere", folder.join("link")).unwrap();
    std::fs::write(folder.join("secret"), b"secret\n").unwrap();
    std::fs::set_permissions(folder.join("secret"), std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Does the work natively: its listing is what is expected everywhere.
pub(crate) fn expected(commands: &Path, tar: &Path) -> Listing {
    let folder = components::folder();
    special(folder.path(), 0);
    let mut script = shell(commands, "work.sh");
    components::run(script.arg(folder.path()).arg(tar));
    list(commands, folder.path())
}

pub(crate) fn list(commands: &Path, tree: &Path) -> Listing {
    lines(&components::run(shell(commands, "list.sh").arg(tree)))
}

/// What a listing says, by whichever way it came.
pub(crate) fn lines(text: &str) -> Listing {
    text.lines().map(|line| line.trim_end().to_owned()).collect()
}

fn shell(commands: &Path, name: &str) -> Command {
    let mut shell = Command::new(commands.join("sh"));
    shell.arg(script(name)).env("PATH", commands);
    shell
}

/// Fails with what differs, and not with all that there is.
pub(crate) fn assert_same(what: &str, found: &Listing, expected: &Listing) {
    let missing: Vec<_> = expected.difference(found).take(10).collect();
    let strange: Vec<_> = found.difference(expected).take(10).collect();
    assert!(
        missing.is_empty() && strange.is_empty() && !found.is_empty(),
        "{what}: {} lines for {}; missing: {missing:#?}; too many: {strange:#?}",
        found.len(),
        expected.len()
    );
}
