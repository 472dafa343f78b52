//! Each call, argument by argument, through locum and without it: the same errno and the same effect.
//!
//! The oracle is the same program, making the same calls directly: for name_to_handle_at(2) as the workload's user with
//! no rights, since the call needs none; for open_by_handle_at(2) as that user with CAP_DAC_READ_SEARCH, which is what
//! is missing; and for what is a matter of permission on the file, by that user's own open(2).
//!
//! What differs, and is meant to: the trailer's 24 bytes; EOPNOTSUPP for what lies on no export (`class` "outside"); with
//! `o_path = "fast"`, the flags of a stand-in for an O_PATH descriptor ("path"); ESTALE for a handle whose type was changed, which
//! some file systems would open ("signed"); O_NOFOLLOW as F_GETFL tells it ("nofollow").
//!
//! Of the faults found in others' code, here: calls by threads that lead no group; null pointers and empty buffers; a failed
//! look-up that lets the call through; FIFOs and devices that are opened for somebody; every error turned into EPERM; O_PATH
//! silently taken off.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{USER, locum};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use serde_json::Value;
use tempfile::TempDir;

/// A file system in a private folder, mounted at `fs`, and read-only at `ro`.
struct Ground {
    base: TempDir,
    mounted: Vec<PathBuf>,
}

fn done(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

impl Ground {
    fn new(kind: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root: run it with cargo xtask test");
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(base.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let mut ground = Self { base, mounted: Vec::new() };
        for name in ["fs", "ro"] {
            std::fs::create_dir(ground.path(name)).unwrap();
        }
        let (fs, ro, image) = (ground.text("fs"), ground.text("ro"), ground.text("image"));
        if kind == "tmpfs" {
            done("mount", &["-t", "tmpfs", "none", &fs]);
        } else {
            std::fs::File::create(&image).unwrap().set_len(320 << 20).unwrap();
            let quiet = if kind == "ext4" { "-Fq" } else { "-fq" };
            done(&format!("mkfs.{kind}"), &[quiet, &image]);
            // The loop device goes with its mount.
            done("mount", &["-o", "loop", &image, &fs]);
        }
        ground.mounted.push(ground.path("fs"));
        ground.fill();
        done("mount", &["--bind", &fs, &ro]);
        ground.mounted.push(ground.path("ro"));
        done("mount", &["-o", "remount,bind,ro", &ro]);
        common::copy_caller(&ground.path("caller"));
        ground
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// What the cases name.
    fn fill(&self) {
        let fs = self.path("fs");
        let own = |path: &Path, mode: u32| {
            chown(path, Some(USER), Some(USER)).unwrap();
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        own(&fs, 0o755);
        let folder = |name: &str, mode| std::fs::DirBuilder::new().mode(mode).create(fs.join(name)).unwrap();
        let file = |name: &str, mode| {
            std::fs::write(fs.join(name), b"12345").unwrap();
            std::fs::set_permissions(fs.join(name), PermissionsExt::from_mode(mode)).unwrap();
        };
        for (name, mode) in [("folder", 0o755), ("closed", 0o700), ("listed", 0o755)] {
            folder(name, mode);
        }
        for (name, mode) in [
            ("file", 0o644),
            ("folder/inner", 0o644),
            ("closed/file", 0o644),
            ("theirs", 0o644),
            ("secret", 0o600),
            ("grouped", 0o640),
        ] {
            file(name, mode);
        }
        for name in ["file", "folder", "folder/inner"] {
            own(&fs.join(name), if name == "folder" { 0o755 } else { 0o644 });
        }
        chown(fs.join("grouped"), None, Some(USER)).unwrap();
        std::fs::write(
            fs.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"bytes-\xff\xfe")),
            b"",
        )
        .unwrap();
        for (target, name) in
            [("file", "link"), ("nowhere", "dangling"), ("loop", "loop"), ("/inner", "folder/up")]
        {
            symlink(target, fs.join(name)).unwrap();
        }
        let node = |name, kind, device| {
            rustix::fs::mknodat(CWD, fs.join(name), kind, Mode::from_raw_mode(0o666), device).unwrap();
        };
        node("fifo", FileType::Fifo, 0);
        node("device", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        common::copy_program("/bin/sleep".as_ref(), &fs.join("running"));
        own(&fs.join("running"), 0o755);
        // It goes with its file system.
        file("frozen", 0o666);
        done("chattr", &["+i", fs.join("frozen").to_str().unwrap()]);
    }

    fn cases(mut command: Command) -> BTreeMap<String, Value> {
        let out = command.env("LOCUM_LOG", "warn").output().unwrap();
        let (text, log) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{command:?}: {}\n{text}\n{log}", out.status);
        let mut cases = BTreeMap::new();
        for line in text.lines() {
            let case: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            let name = case["case"].as_str().unwrap().to_owned();
            assert!(cases.insert(name, case).is_none(), "the same case twice: {line}");
        }
        assert!(cases.len() > 20, "{text}\n{log}");
        cases
    }

    fn directly(&self, mode: &str, set: &str) -> BTreeMap<String, Value> {
        let mut command = Command::new(self.path("caller"));
        command.args([mode, set, &self.text("fs")]);
        Self::cases(command)
    }

    fn through_locum(&self, o_path: &str, set: &str) -> BTreeMap<String, Value> {
        let policy = self.path("policy.toml");
        std::fs::write(&policy, format!("[parity]\no_path = {o_path:?}\n")).unwrap();
        let mut command = locum(&["run", "--user", "65534", "--policy", policy.to_str().unwrap()]);
        command.args(["--export", &self.text("fs"), "--export", &self.text("ro"), "--"]);
        command.args([&self.text("caller"), "as-is", set, &self.text("fs")]);
        Self::cases(command)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for mount in self.mounted.iter().rev() {
            let _ = Command::new("umount").arg("--lazy").arg(mount).status();
        }
    }
}

const TRAILER: u64 = 24;

fn octal(flags: &Value) -> i64 {
    i64::from_str_radix(flags.as_str().unwrap().trim_start_matches("0o"), 8).unwrap()
}

/// What locum should tell, from what the kernel told.
fn expected(o_path: &str, native: &Value, locum: &Value) -> Value {
    let mut wanted = native.clone();
    match locum["class"].as_str().unwrap() {
        // Never named, so never opened.
        "unnamed" if native["result"] != "ok" => {
            wanted["result"] = "errno 95".into();
            wanted["effect"] = Value::Null;
        }
        "outside" if native["result"] == "ok" => {
            wanted["result"] = "errno 95".into();
            // Nothing is written.
            wanted["effect"] =
                serde_json::json!({"bytes": 128, "type": -1, "wrote": 0, "mount": "untouched"});
        }
        // The signature covers the type; some file systems do not look at it.
        "signed" if native["result"] == "ok" => {
            wanted["result"] = "errno 116".into();
            wanted["effect"]["fd"] = Value::Null;
        }
        // Opened by way of a link, without the flag, which changes nothing once a file is open.
        "nofollow" if native["result"] == "ok" => {
            let flags = octal(&native["effect"]["fd"]["flags"]) & !i64::from(OFlags::NOFOLLOW.bits());
            wanted["effect"]["fd"]["flags"] = format!("{flags:#o}").into();
        }
        // The same file, which may be read.
        "path" if native["result"] == "ok" && o_path == "fast" => {
            let flags = octal(&locum["effect"]["fd"]["flags"]);
            assert_eq!(flags & 3, 0, "a stand-in that can be written: {locum}");
            wanted["effect"]["fd"]["flags"] = locum["effect"]["fd"]["flags"].clone();
        }
        _ => {}
    }
    for size in ["bytes", "wrote"] {
        let (Some(theirs), Some(ours)) = (native["effect"][size].as_u64(), locum["effect"][size].as_u64())
        else {
            continue;
        };
        // Where the kernel wrote a handle, or said how long one is.
        if theirs != ours && native["result"] == locum["result"] && theirs + TRAILER == ours {
            wanted["effect"][size] = ours.into();
        }
    }
    wanted
}

fn compare(
    kind: &str,
    o_path: &str,
    native: &BTreeMap<String, Value>,
    locum: &BTreeMap<String, Value>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, ours) in locum {
        let Some(theirs) = native.get(name) else {
            wrong.push(format!("{kind}: {name}: only through locum: {ours}"));
            continue;
        };
        let wanted = expected(o_path, theirs, ours);
        if (&wanted["result"], &wanted["effect"]) != (&ours["result"], &ours["effect"]) {
            wrong.push(format!(
                "{kind}, {o_path}: {name}\n  kernel {} {}\n  locum  {} {}",
                theirs["result"], theirs["effect"], ours["result"], ours["effect"]
            ));
        }
    }
    wrong.extend(
        native
            .keys()
            .filter(|name| !locum.contains_key(*name))
            .map(|name| format!("{kind}: {name}: not through locum")),
    );
    wrong
}

fn parity(kind: &str) {
    let ground = Ground::new(kind);
    let named = ground.directly("own", "name");
    let mut native = ground.directly("decode", "open");
    native.retain(|_, case| case["class"] != "permission");
    let by_permission = ground.directly("own", "permission");
    native.extend(by_permission);
    let mut wrong = Vec::new();
    for o_path in ["exact", "fast"] {
        wrong.extend(compare(kind, o_path, &named, &ground.through_locum(o_path, "name")));
        wrong.extend(compare(kind, o_path, &native, &ground.through_locum(o_path, "open")));
    }
    assert!(wrong.is_empty(), "{} cases differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn on_ext4() {
    parity("ext4");
}

#[test]
fn on_xfs() {
    parity("xfs");
}

#[test]
fn on_btrfs() {
    parity("btrfs");
}

#[test]
fn on_tmpfs() {
    parity("tmpfs");
}
