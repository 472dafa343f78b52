//! open_by_handle_at(2), argument by argument.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::bare::{AT_FDCWD, Ground, Pages, UNMAPPED, call, close, descriptor, fd, open, tell};

const PATH: u64 = 0o10_000_000;
const TRUNC: u64 = 0o1000;

/// Opens `handle` and tells what came of it, with `path` as the file that is meant.
fn tell_open(ground: &Ground, class: &str, case: &str, mount: u64, handle: &[u8], flags: u64, path: &str) {
    let pages = Pages::new();
    let at = pages.put(ground, handle);
    let result = open(mount, at, flags);
    let path = ground.path(path);
    let effect = if result < 0 { "null".into() } else { descriptor(result, &path) };
    close(result);
    let size = std::fs::metadata(&path).map_or(0, |file| file.len());
    tell(class, case, result, &format!("{{\"fd\": {effect}, \"size\": {size}}}"));
}

pub(crate) fn run(ground: &Ground) {
    let mount = openat(CWD, &ground.dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    mounts(ground, &mount);
    handles(ground, &mount);
    flags(ground, &mount);
    path_only(ground, &mount);
    permissions(ground, &mount);
    files(ground, &mount);
    full_table(ground, &mount);
}

/// The oracle for what is a matter of permission.
pub(crate) fn permissions_of(ground: &Ground) {
    let mount = openat(CWD, &ground.dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    permissions(ground, &mount);
}

fn mounts(ground: &Ground, mount: &OwnedFd) {
    let handle = ground.handle(&ground.path("file"));
    let opened = |path: &str, flags| openat(CWD, ground.path(path), flags, Mode::empty()).unwrap();
    let (file, path_only, proc) =
        (opened("file", OFlags::RDONLY), opened(".", OFlags::PATH), opened("/proc", OFlags::RDONLY));
    let other = opened("..", OFlags::RDONLY);
    let closed = fd(&opened("file", OFlags::RDONLY));
    let (pipe, _write) = rustix::pipe::pipe().unwrap();
    for (label, dir) in [
        ("AT_FDCWD", AT_FDCWD),
        ("folder", fd(mount)),
        ("folder, upper half garbage", fd(mount) | 0xdead << 32),
        ("file", fd(&file)),
        ("O_PATH", fd(&path_only)),
        ("-1", u64::MAX),
        ("closed", closed),
        ("huge", 0x7fff_ffff),
        ("pipe", fd(&pipe)),
        ("proc", fd(&proc)),
        ("another mount", fd(&other)),
    ] {
        tell_open(ground, "same", &format!("mount {label}"), dir, &handle, 0, "file");
    }
}

fn handles(ground: &Ground, mount: &OwnedFd) {
    let good = ground.handle(&ground.path("file"));
    let with = |at: usize, word: u32| {
        let mut handle = good.clone();
        handle[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        handle.resize(8 + 512, 0);
        handle
    };
    let given = |label: &str, handle: &[u8]| tell_open(ground, "same", label, fd(mount), handle, 0, "file");
    for bytes in [0, 1, 3, 129, 200, 0x7fff_ffff, u32::MAX] {
        given(&format!("{bytes} bytes"), &with(0, bytes));
    }
    given("cut by a byte", &with(0, u32::try_from(good.len() - 9).unwrap()));
    for kind in [-1, i32::MIN, 0xff, 0x1234, 0x10000, 0x20000, 0x40000, 0x7fff_0000] {
        let handle = with(4, kind.cast_unsigned());
        tell_open(ground, "signed", &format!("type {kind:#x}"), fd(mount), &handle, 0, "file");
    }
    // The handle's end lies where nothing can be touched.
    for (label, left) in
        [("the last byte", good.len() - 1), ("its bytes", 8), ("its type", 4), ("the second byte", 1)]
    {
        given(&format!("unmapped from {label}"), &good[..left]);
    }
    for (label, at) in [("NULL", 0), ("unmapped", UNMAPPED), ("in the kernel's half", u64::MAX - 4095)] {
        tell("same", &format!("handle {label}"), open(fd(mount), at, 0), "{}");
        tell("same", &format!("handle {label}, mount -1"), open(u64::MAX, at, 0), "{}");
    }
}

fn flags(ground: &Ground, mount: &OwnedFd) {
    let write = |size: usize| std::fs::write(ground.path("file"), vec![b'x'; size]).unwrap();
    let flag = |flags: OFlags| u64::from(flags.bits());
    let (rdonly, wronly, rdwr) = (0, flag(OFlags::WRONLY), flag(OFlags::RDWR));
    let more = [
        OFlags::DIRECTORY,
        OFlags::NOFOLLOW,
        OFlags::TRUNC,
        OFlags::APPEND,
        OFlags::NONBLOCK,
        OFlags::CLOEXEC,
        OFlags::CREATE,
        OFlags::CREATE | OFlags::EXCL,
        OFlags::EXCL,
        OFlags::TMPFILE,
        OFlags::NOATIME,
        OFlags::SYNC,
        OFlags::DIRECT,
        OFlags::NOCTTY,
        OFlags::APPEND | OFlags::TRUNC | OFlags::CLOEXEC,
    ];
    let more = more.map(flag).into_iter().chain([0, 0o10_000, 1 << 30, 0x8000_0000, 0xffff_ffff_0000_0000]);
    for name in ["file", "folder"] {
        let handle = ground.handle(&ground.path(name));
        for more in more.clone() {
            for access in [rdonly, wronly, rdwr, 3] {
                write(5);
                let case = format!("{name} flags {:#o}", access | more);
                let class = if more == flag(OFlags::NOFOLLOW) { "nofollow" } else { "same" };
                tell_open(ground, class, &case, fd(mount), &handle, access | more, name);
            }
        }
        write(5);
        for more in [
            0,
            OFlags::CLOEXEC.bits(),
            OFlags::NOFOLLOW.bits(),
            OFlags::DIRECTORY.bits(),
            OFlags::TRUNC.bits(),
            OFlags::RDWR.bits(),
        ] {
            let case = format!("{name} O_PATH and {more:#o}");
            tell_open(ground, "path", &case, fd(mount), &handle, PATH | u64::from(more), name);
        }
    }
}

/// What can be opened with O_PATH alone, by this user.
fn path_only(ground: &Ground, mount: &OwnedFd) {
    for name in ["link", "dangling", "loop", "fifo", "device", "secret", "theirs", "folder/up"] {
        let handle = ground.handle(&ground.path(name));
        for more in [OFlags::empty(), OFlags::CLOEXEC, OFlags::NOFOLLOW, OFlags::DIRECTORY, OFlags::TRUNC] {
            let case = format!("{name} O_PATH and {:#o}", more.bits());
            let class = if name == "theirs" { "path" } else { "same" };
            tell_open(ground, class, &case, fd(mount), &handle, PATH | u64::from(more.bits()), name);
        }
    }
}

/// What is a matter of permission: by the user's own open(2) if there is no locum.
fn permissions(ground: &Ground, mount: &OwnedFd) {
    for name in ["theirs", "closed", "listed", "grouped", "frozen", "lost"] {
        let path = ground.path(name);
        if name == "lost" {
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, b"12345").unwrap();
        }
        let handle = ground.handle_with(&path, 0);
        if name == "lost" {
            // Named while it could be read, opened when it cannot.
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o0)).unwrap();
        }
        for flags in
            [0, 1, 2, TRUNC, 1 | TRUNC, OFlags::NOATIME.bits().into(), OFlags::DIRECTORY.bits().into()]
        {
            let case = format!("permission on {name}, flags {flags:#o}");
            if ground.own {
                let mut text = path.as_os_str().as_bytes().to_vec();
                text.push(0);
                let pages = Pages::new();
                let at = pages.put(ground, &text);
                let result = call(libc::SYS_openat, [AT_FDCWD, at, flags, 0, 0, 0]);
                let effect = if result < 0 { "null".into() } else { descriptor(result, &path) };
                close(result);
                let size = std::fs::metadata(&path).map_or(0, |file| file.len());
                tell("permission", &case, result, &format!("{{\"fd\": {effect}, \"size\": {size}}}"));
            } else if let Ok(handle) = &handle {
                tell_open(ground, "permission", &case, fd(mount), handle, flags, name);
            } else {
                tell("unnamed", &case, handle.as_ref().unwrap_err().to_owned(), "null");
            }
        }
    }
}

fn files(ground: &Ground, mount: &OwnedFd) {
    // Deleted: while it is open, and after that.
    let path = ground.path("deleted");
    let file = File::create(&path).unwrap();
    let handle = ground.handle(&path);
    std::fs::remove_file(&path).unwrap();
    tell_open(ground, "same", "deleted, still open", fd(mount), &handle, 0, "deleted");
    drop(file);
    tell_open(ground, "same", "deleted", fd(mount), &handle, 0, "deleted");
    let path = ground.path("removed");
    std::fs::create_dir(&path).unwrap();
    let handle = ground.handle(&path);
    std::fs::remove_dir(&path).unwrap();
    tell_open(ground, "same", "removed folder", fd(mount), &handle, 0, "removed");
    // Renamed, and found where it is now.
    let file = File::create(ground.path("before")).unwrap();
    let handle = ground.handle(&ground.path("before"));
    drop(file);
    std::fs::rename(ground.path("before"), ground.path("after")).unwrap();
    tell_open(ground, "same", "renamed", fd(mount), &handle, 2, "after");
    std::fs::remove_file(ground.path("after")).unwrap();
    // A program that runs cannot be written.
    let program = ground.path("running");
    let mut running = std::process::Command::new(&program).arg("30").spawn().unwrap();
    let handle = ground.handle(&program);
    for flags in [0, 1, 2, TRUNC | 1] {
        tell_open(
            ground,
            "same",
            &format!("running program, flags {flags:#o}"),
            fd(mount),
            &handle,
            flags,
            "running",
        );
    }
    running.kill().unwrap();
    running.wait().unwrap();
    // The same file by way of a read-only mount.
    let read_only = openat(CWD, ground.path("../ro"), OFlags::RDONLY, Mode::empty()).unwrap();
    let handle = ground.handle(&ground.path("../ro/file"));
    for flags in [0, 1, 2, TRUNC, PATH] {
        let class = if flags == PATH { "path" } else { "same" };
        let case = format!("read-only mount, flags {flags:#o}");
        tell_open(ground, class, &case, fd(&read_only), &handle, flags, "file");
    }
}

/// EMFILE, and the file is as it was.
fn full_table(ground: &Ground, mount: &OwnedFd) {
    std::fs::write(ground.path("file"), b"12345").unwrap();
    let handle = ground.handle(&ground.path("file"));
    let limit = [64_u64, 64];
    let pages = Pages::new();
    let at = pages.put(ground, &limit.map(u64::to_ne_bytes).concat());
    assert_eq!(call(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE.into(), at, 0, 0, 0]), 0);
    let mut filled = Vec::new();
    while let Ok(copy) = rustix::io::dup(mount) {
        filled.push(copy);
    }
    for flags in [0, PATH, 2 | TRUNC, 1 << 25] {
        let path = ground.path("file");
        let at = Pages::new();
        let result = open(fd(mount), at.put(ground, &handle), flags);
        let size = std::fs::metadata(path).unwrap().len();
        tell("same", &format!("full table, flags {flags:#o}"), result, &format!("{{\"size\": {size}}}"));
    }
}
