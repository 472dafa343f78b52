//! name_to_handle_at(2), argument by argument.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::bare::{AT_FDCWD, EMPTY_PATH, FOLLOW, Ground, Pages, UNMAPPED, call, fd, name, number, tell};

const FID: u64 = 0x200;
const UNIQUE: u64 = 1;
const CONNECTABLE: u64 = 2;

/// One call: where the handle goes, and with what room.
struct Case<'a> {
    ground: &'a Ground,
    dir: u64,
    path: u64,
    flags: u64,
}

impl Case<'_> {
    /// The bytes of the handle, the type, how many bytes were written behind them, and the mount id.
    fn effect(&self, room: u32, visible: usize) -> (i64, String) {
        let (mut wrote, mut told) = (0, (0, String::new()));
        // Two fills, since a byte may be written with the value that it had.
        for fill in [0xa5_u8, 0x5a] {
            let (pages, mount) = (Pages::new(), Pages::new());
            let handle = pages.end(visible);
            self.ground.write(handle, &vec![fill; visible]);
            self.ground.write(handle, &room.to_ne_bytes()[..visible.min(4)]);
            self.ground.write(mount.end(8), &[fill; 8]);
            let result = name(self.dir, self.path, handle, mount.end(8), self.flags);
            let after = self.ground.read(handle, visible);
            let own = after.get(8..).unwrap_or_default();
            wrote = wrote.max(own.iter().rposition(|byte| *byte != fill).map_or(0, |last| last + 1));
            let word = |at: usize| {
                after.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap()))
            };
            let kind = if word(4) == u32::from_ne_bytes([fill; 4]) { -1 } else { i64::from(word(4)) };
            let id = self.ground.mount_told(&self.ground.read(mount.end(8), 8), fill);
            told = (
                result,
                format!(
                    "{{\"bytes\": {}, \"type\": {kind}, \"wrote\": {wrote}, \"mount\": {id:?}}}",
                    word(0)
                ),
            );
        }
        told
    }

    fn tell(&self, class: &str, case: &str) {
        self.tell_room(class, case, 128);
    }

    fn tell_room(&self, class: &str, case: &str, room: u32) {
        let (result, effect) = self.effect(room, 8 + 512);
        tell(class, case, result, &effect);
    }
}

pub(crate) fn run(ground: &Ground) {
    paths(ground);
    descriptors(ground);
    memory(ground);
    flags(ground);
    threads(ground);
    // A user namespace wants a process of its own.
    let jail = ["as-is", "jail", ground.dir.to_str().unwrap()];
    assert!(std::process::Command::new("/proc/self/exe").args(jail).status().unwrap().success());
}

/// With a root of its own, then also with mounts of its own, which are no exports.
pub(crate) fn jail(ground: &Ground) {
    let unshare = |what: i32| assert_eq!(call(libc::SYS_unshare, [number(what), 0, 0, 0, 0, 0]), 0);
    let text = Pages::new();
    let at = |class: &str, label: &str, path: &str, flags: u64| {
        let path = text.put(ground, format!("{path}\0").as_bytes());
        Case { ground, dir: AT_FDCWD, path, flags }.tell(class, label);
    };
    unshare(libc::CLONE_NEWUSER);
    at("same", "user namespace", "file", 0);
    let root = text.put(ground, b"folder\0");
    assert_eq!(call(libc::SYS_chroot, [root, 0, 0, 0, 0, 0]), 0);
    at("same", "chroot, folder left outside", "file", 0);
    at("same", "chroot, a path from its root", "/inner", 0);
    std::env::set_current_dir("/").unwrap();
    for path in ["/", "..", "inner", "../../inner", "/../inner", "file"] {
        at("same", &format!("chroot {path}"), path, 0);
    }
    at("same", "chroot, an absolute link", "up", FOLLOW);
    at("same", "chroot, the folder itself", "", EMPTY_PATH);
    unshare(libc::CLONE_NEWNS);
    at("outside", "mount namespace of its own", "inner", 0);
}

fn paths(ground: &Ground) {
    let at = |class: &str, path: &[u8], flags: u64| {
        let pages = Pages::new();
        let mut bytes = path.to_vec();
        bytes.push(0);
        let label =
            if path.len() > 60 { format!("{} bytes", path.len()) } else { path.escape_ascii().to_string() };
        let case = Case { ground, dir: AT_FDCWD, path: pages.put(ground, &bytes), flags };
        case.tell(
            class,
            &format!("path {label} flags {flags:#x}").replace(ground.dir.to_str().unwrap(), "DIR"),
        );
    };
    let absolute = |name: &str| ground.path(name).into_os_string().into_encoded_bytes();
    at("same", &absolute("file"), 0);
    at("same", &absolute("folder"), 0);
    for path in ["file", "folder", "folder/inner", "./folder/../file", ".", "folder/", "theirs"] {
        at("same", path.as_bytes(), 0);
    }
    for path in ["file/", "file/x", "", "nowhere", "nowhere/x", "closed/file", "dangling/", "loop/x"] {
        at("same", path.as_bytes(), 0);
        at("same", path.as_bytes(), FOLLOW);
    }
    at("same", b"bytes-\xff\xfe", 0);
    for path in ["link", "file"] {
        at("same", path.as_bytes(), FOLLOW);
    }
    for path in ["dangling", "loop"] {
        at("same", path.as_bytes(), FOLLOW);
    }
    for path in ["link", "dangling", "loop", "fifo", "device", "secret"] {
        at("same", path.as_bytes(), 0);
        at("same", path.as_bytes(), FID);
    }
    at("same", b"/proc/self/status", 0);
    at("same", &[b'a'; 256], 0);
    let slashes = |count: usize| [vec![b'/'; count], b"file".to_vec()].concat();
    at("same", &[b"folder".to_vec(), slashes(4096)].concat(), 0);
    at("same", &[b".".to_vec(), slashes(4095 - 5)].concat(), 0);
    at("same", &[b".".to_vec(), slashes(4095 - 4)].concat(), 0);
    let mut unended = Case { ground, dir: AT_FDCWD, path: 0, flags: 0 };
    unended.tell("same", "path NULL");
    unended.flags = EMPTY_PATH;
    unended.tell("same", "path NULL with AT_EMPTY_PATH");
    (unended.flags, unended.path) = (0, UNMAPPED);
    unended.tell("same", "path unmapped");
    unended.path = u64::MAX - 3;
    unended.tell("same", "path in the kernel's half");
    let pages = Pages::new();
    unended.path = pages.put(ground, b"file");
    unended.tell("same", "path without an end before what is unmapped");
}

fn descriptors(ground: &Ground) {
    let text = Pages::new();
    let (file, empty) = (text.end(5), text.end(6) - 10);
    ground.write(file, b"file\0");
    ground.write(empty, b"\0");
    let open = |path: &str, flags| openat(CWD, ground.path(path), flags, Mode::empty()).unwrap();
    let closed = {
        let gone: OwnedFd = open("file", OFlags::RDONLY);
        fd(&gone)
    };
    let (pipe, _write) = rustix::pipe::pipe().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let memory = rustix::fs::memfd_create(c"m", rustix::fs::MemfdFlags::empty()).unwrap();
    let deleted = {
        let path = ground.path("deleted");
        let file = File::create(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    };
    let (folder, normal, path_only, path_folder) = (
        open(".", OFlags::RDONLY),
        open("file", OFlags::RDONLY),
        open("file", OFlags::PATH),
        open("folder", OFlags::PATH),
    );
    let link = open("link", OFlags::PATH | OFlags::NOFOLLOW);
    let proc = open("/proc/self/status", OFlags::RDONLY);
    let by = |class: &str, label: &str, dir: u64, path: u64, flags: u64| {
        Case { ground, dir, path, flags }.tell(class, &format!("descriptor {label} flags {flags:#x}"));
    };
    by("same", "folder, relative", fd(&folder), file, 0);
    by("same", "folder, relative, empty allowed", fd(&folder), file, EMPTY_PATH);
    by("same", "folder, upper half garbage", fd(&folder) | 0xdead_beef << 32, file, 0xffff_ffff << 32);
    by("same", "O_PATH folder, relative", fd(&path_folder), file, 0);
    for (label, dir) in [
        ("-1", u64::MAX),
        ("closed", closed),
        ("huge", 0x7fff_ffff),
        ("999999", 999_999),
        ("pipe", fd(&pipe)),
        ("socket", fd(&socket)),
        ("file", fd(&normal)),
        ("O_PATH file", fd(&path_only)),
        ("memfd", fd(&memory)),
        ("proc", fd(&proc)),
    ] {
        by("same", &format!("{label}, relative"), dir, file, 0);
        by("same", &format!("{label}, empty path"), dir, empty, 0);
        by("same", &format!("{label}, NULL path"), dir, 0, 0);
        let class = if label == "memfd" { "outside" } else { "same" };
        by(class, &format!("{label}, itself"), dir, empty, EMPTY_PATH);
    }
    by("same", "AT_FDCWD, itself", AT_FDCWD, empty, EMPTY_PATH);
    by("same", "AT_FDCWD, itself, followed", AT_FDCWD, empty, EMPTY_PATH | FOLLOW);
    by("same", "folder, itself", fd(&folder), empty, EMPTY_PATH);
    by("same", "deleted file, itself", fd(&deleted), empty, EMPTY_PATH);
    by("same", "link, itself", fd(&link), empty, EMPTY_PATH);
    by("same", "link, itself, followed", fd(&link), empty, EMPTY_PATH | FOLLOW);
    by("same", "link, itself, to compare", fd(&link), empty, EMPTY_PATH | FID);
}

fn memory(ground: &Ground) {
    let text = Pages::new();
    let path = text.put(ground, b"file\0");
    let missing = text.0;
    ground.write(missing, b"nowhere\0");
    let case = Case { ground, dir: AT_FDCWD, path, flags: 0 };
    let size = u32::try_from(ground.handle(&ground.path("file")).len() - 8).unwrap();
    for (label, room) in [
        ("0", 0),
        ("1", 1),
        ("one less", size - 1),
        ("exact", size),
        ("one more", size + 1),
        ("127", 127),
        ("128", 128),
        ("129", 129),
        ("the most", u32::MAX),
    ] {
        case.tell_room("same", &format!("room {label}"), room);
        let absent = Case { path: missing, ..case };
        absent.tell_room("same", &format!("room {label}, no such file"), room);
    }
    // The handle ends at the end of what can be touched, or beyond it.
    for visible in [0, 2, 4, 6, 8, 8 + size as usize - 1, 8 + size as usize] {
        let left = i64::try_from(visible).unwrap() - 8 - i64::from(size);
        let label = if visible > 8 { format!("the end {left:+}") } else { format!("{visible}") };
        let (result, effect) = case.effect(128, visible);
        tell("cut", &format!("handle with {label} bytes"), result, &effect);
    }
    let pages = Pages::new();
    ground.write(pages.0, &128_u32.to_ne_bytes());
    let (handle, mount) = (pages.0, pages.end(8));
    for (label, handle, mount) in [
        ("handle NULL", 0, mount),
        ("handle unmapped", UNMAPPED, mount),
        ("handle in the kernel's half", u64::MAX - 4095, mount),
        ("mount NULL", handle, 0),
        ("mount unmapped", handle, UNMAPPED),
        ("mount cut", handle, pages.end(2)),
        ("both unmapped", UNMAPPED, UNMAPPED),
        ("both NULL", 0, 0),
    ] {
        ground.write(pages.0, &[&128_u32.to_ne_bytes()[..], &[0xa5; 60]].concat());
        ground.write(pages.end(8), &[0xa5; 8]);
        let result = name(AT_FDCWD, path, handle, mount, 0);
        let id = ground.mount_told(&ground.read(pages.end(8), 8), 0xa5);
        let head = ground.read(pages.0 + 4, 4) != [0xa5; 4];
        tell("same", label, result, &format!("{{\"written\": {head}, \"mount\": {id:?}}}"));
        let result = name(AT_FDCWD, missing, handle, mount, 0);
        tell("same", &format!("{label}, no such file"), result, "{}");
    }
    let (frozen, other) = (Pages::new(), Pages::new());
    ground.write(frozen.0, &128_u32.to_ne_bytes());
    frozen.read_only();
    ground.write(other.0, &128_u32.to_ne_bytes());
    let result = name(AT_FDCWD, path, frozen.0, other.end(8), 0);
    let effect = format!("{{\"written\": {:?}}}", ground.read(frozen.0, 16));
    tell("same", "handle read-only", result, &effect);
    let result = name(AT_FDCWD, path, other.0, frozen.end(8), 0);
    let effect =
        format!("{{\"written\": {:?}}}", [ground.read(other.0, 16), ground.read(frozen.end(8), 8)].concat());
    tell("same", "mount read-only", result, &effect);
}

fn flags(ground: &Ground) {
    let text = Pages::new();
    let (path, empty) = (text.put(ground, b"file\0"), text.0);
    let folder = text.0 + 16;
    ground.write(folder, b"folder\0");
    let combined: Vec<u64> = (0..8_u64)
        .map(|set| {
            [FID, UNIQUE, CONNECTABLE]
                .iter()
                .enumerate()
                .filter(|(bit, _)| set >> bit & 1 == 1)
                .map(|(_, flag)| flag)
                .sum()
        })
        .collect();
    for flags in &combined {
        for extra in [0, FOLLOW, EMPTY_PATH] {
            let flags = flags | extra;
            Case { ground, dir: AT_FDCWD, path, flags }.tell("same", &format!("flags {flags:#x} file"));
            Case { ground, dir: AT_FDCWD, path: folder, flags }
                .tell("same", &format!("flags {flags:#x} folder"));
            Case { ground, dir: AT_FDCWD, path: empty, flags }
                .tell("same", &format!("flags {flags:#x} empty"));
        }
    }
    for bit in 0..32 {
        let flags = 1_u64 << bit;
        Case { ground, dir: AT_FDCWD, path, flags }.tell("same", &format!("flag {flags:#x}"));
        Case { ground, dir: u64::MAX, path: 0, flags }
            .tell("same", &format!("flag {flags:#x}, all else bad"));
    }
    Case { ground, dir: AT_FDCWD, path, flags: 0xffff_ffff }.tell("same", "all flags");
}

fn threads(ground: &Ground) {
    std::thread::scope(|scope| {
        let asked = || {
            let text = Pages::new();
            let path = text.put(ground, b"file\0");
            Case { ground, dir: AT_FDCWD, path, flags: 0 }.tell("same", "from a thread");
            assert_eq!(call(libc::SYS_unshare, [number(libc::CLONE_FILES), 0, 0, 0, 0, 0]), 0);
            let folder = openat(CWD, ground.path("folder"), OFlags::PATH, Mode::empty()).unwrap();
            ground.write(text.0, b"inner\0");
            Case { ground, dir: fd(&folder), path: text.0, flags: 0 }
                .tell("same", "from a descriptor table of its own");
            assert_eq!(call(libc::SYS_unshare, [number(libc::CLONE_FS), 0, 0, 0, 0, 0]), 0);
            std::env::set_current_dir(ground.path("folder")).unwrap();
            Case { ground, dir: AT_FDCWD, path: text.0, flags: 0 }
                .tell("same", "from a working directory of its own");
        };
        scope.spawn(asked).join().unwrap();
    });
}
