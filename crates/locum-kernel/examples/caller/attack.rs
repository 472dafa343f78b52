//! What a caller that means harm does. Each attack fails by panicking.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use locum_kernel::filter::{Filter, Wait};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::bare::{AT_FDCWD, Ground, Pages, call, close, descriptor, fd, int80, name, number, open, told};

const STALE: i64 = -(libc::ESTALE as i64);
const IO: i64 = -(libc::EIO as i64);
const FID: u64 = 0x200;
const FOLLOW: u64 = 0x400;

pub(crate) fn run(attack: &str, ground: &Ground, args: &[String]) {
    match (attack, args) {
        ("forge", [secret]) => forge(ground, &unhex(secret)),
        ("print", [file]) => println!("{}", hex(&ground.handle(&ground.path(file)))),
        ("open-one", [handle, wanted]) => {
            assert_eq!(opened(&folder(ground, "."), &unhex(handle)), wanted.parse::<i64>().unwrap());
        }
        ("exports", []) => exports(ground),
        ("magic-links", []) => magic_links(ground),
        ("rewrite", []) => rewrite(ground),
        ("thousand", []) => thousand(ground),
        ("full", []) => full(ground),
        ("deaths", []) => deaths(ground),
        ("spin", []) => spin(ground),
        ("bystander", []) => bystander(ground),
        ("other-arch", []) => other_arch(ground),
        ("fault", [kind]) => fault(ground, kind),
        ("foreign-pid", [door]) => foreign_pid(ground, door),
        ("keyed", []) => keyed(ground),
        // Unhelped: the kernel's bare handle, and no right to open it.
        ("unserved", []) => {
            let handle = ground.handle(&ground.path("file"));
            assert_eq!(opened(&folder(ground, "."), &handle), -i64::from(libc::EPERM));
        }
        _ => panic!("no attack {attack} with {args:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn folder(ground: &Ground, path: &str) -> OwnedFd {
    openat(CWD, ground.path(path), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

/// Opens `handle`, and tells the error, or 0 for a descriptor, which is closed.
fn opened(mount: &OwnedFd, handle: &[u8]) -> i64 {
    with_memory(|ground, pages| {
        let result = open(fd(mount), pages.put(ground, handle), 0);
        close(result);
        result.min(0)
    })
}

/// A ground of this thread's own is not needed for more than its memory.
fn with_memory<T>(work: impl FnOnce(&Ground, &Pages) -> T) -> T {
    let here = std::env::current_dir().unwrap();
    work(&Ground::new(here.to_str().unwrap(), false), &Pages::new())
}

fn sized(kind: &[u8], bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_ne_bytes()[..], kind, bytes].concat()
}

fn forge(ground: &Ground, secret: &[u8]) {
    let mount = folder(ground, ".");
    let good = ground.handle(&ground.path("file"));
    assert_eq!(opened(&mount, &good), 0);
    let (kind, bytes) = (&good[4..8], &good[8..]);
    // Bits of the type and of what follows; those of the length are the cut and grown ones.
    for bit in 4 * 8..good.len() * 8 {
        let mut forged = good.clone();
        forged[bit / 8] ^= 1 << (bit % 8);
        let refused = opened(&mount, &forged);
        let is_flag = (6 * 8..8 * 8).contains(&bit);
        assert!(refused == STALE || (is_flag && refused == -i64::from(libc::EINVAL)), "bit {bit}: {refused}");
    }
    for kind in (0..=255_u32).filter(|kind| kind.to_ne_bytes() != good[4..8]) {
        assert_eq!(opened(&mount, &sized(&kind.to_ne_bytes(), bytes)), STALE, "type {kind}");
    }
    for len in 1..bytes.len() {
        assert_eq!(opened(&mount, &sized(kind, &bytes[..len])), STALE, "cut to {len}");
    }
    for len in bytes.len() + 1..=128 {
        let grown = [bytes, &vec![0; len - bytes.len()][..]].concat();
        assert_eq!(opened(&mount, &sized(kind, &grown)), STALE, "grown to {len}");
    }
    let compare = ground.handle_with(&ground.path("file"), FID).unwrap();
    assert_ne!(compare, good);
    assert_eq!(opened(&mount, &compare), STALE, "a handle to compare with");
    // A handle as root would get it: bare, and with the trailer of another file.
    let trailer = &bytes[bytes.len() - 24..];
    assert_eq!(opened(&mount, secret), STALE, "a guessed inode");
    let dressed = sized(&secret[4..8], &[&secret[8..], trailer].concat());
    assert_eq!(opened(&mount, &dressed), STALE, "a guessed inode with a trailer");
    for other in ["/proc", "/dev", "/dev/shm", "/sys"] {
        let other = openat(CWD, other, OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(opened(&other, &good), STALE, "a descriptor on another mount");
    }
}

/// `../one` and `../two` are exports with the same files.
/// For each line that comes in: the file's handle or the error, and what opening the first such handle gives.
fn keyed(ground: &Ground) {
    let (mount, path) = (folder(ground, "."), ground.path("file"));
    let mut first = None;
    for _ in std::io::stdin().lines() {
        let named = ground.handle_with(&path, 0);
        first = first.or_else(|| named.clone().ok());
        let opened = first.as_ref().map_or(STALE, |first| opened(&mount, first));
        println!("{} {opened}", named.map_or_else(|error| error.to_string(), |handle| hex(&handle)));
    }
}

fn exports(ground: &Ground) {
    for (export, other) in [("../one", "../two"), ("../two", "../one")] {
        let handle = ground.handle(&ground.path(&format!("{export}/file")));
        assert_eq!(opened(&folder(ground, export), &handle), 0);
        assert_eq!(opened(&folder(ground, other), &handle), STALE);
    }
}

/// By way of /proc, descriptors and folders of whoever looks the path up, if they are not the caller's own.
fn magic_links(ground: &Ground) {
    let refused = |path: &str| {
        let named = ground.handle_with(path.as_ref(), FOLLOW);
        assert!(named.is_err(), "{path}: {named:?}");
    };
    for of in ["self", "thread-self"] {
        (0..256).for_each(|fd| refused(&format!("/proc/{of}/fd/{fd}")));
        for folder in ["cwd", "root", "exe"] {
            refused(&format!("/proc/{of}/{folder}"));
        }
    }
}

/// Another thread rewrites path, handle and length while they are being read.
fn rewrite(ground: &Ground) {
    let mount = folder(ground, ".");
    let good = ground.handle(&ground.path("file"));
    let theirs = ground.handle(&ground.path("theirs"));
    let (path, pages, mount_id) = (Pages::new(), Pages::new(), Pages::new());
    let (path, at) = (path.put(ground, b"file\0"), pages.put(ground, &good));
    let room = pages.0;
    // The first call may come before the other thread has begun.
    ground.write(room, &128_u32.to_ne_bytes());
    let mixed: Vec<u8> =
        good.iter().zip(&theirs).enumerate().map(|(i, (a, b))| if i < 20 { *a } else { *b }).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for handle in [&mixed, &theirs, &good] {
                    ground.write(at, handle);
                }
                ground.write(path, b"nope\0");
                ground.write(room, &u32::MAX.to_ne_bytes());
                ground.write(path, b"file\0");
                ground.write(room, &128_u32.to_ne_bytes());
            }
        });
        // A failure must not leave the other thread at it for ever.
        let _over = Over(&done);
        let (mut right, mut refused) = (0, 0);
        for _ in 0..4000 {
            match open(fd(&mount), at, 0) {
                fd if fd >= 0 => {
                    let whose =
                        [ground.path("file"), ground.path("theirs")].map(|path| descriptor(fd, &path));
                    assert!(whose.iter().any(|whose| whose.contains("\"same\": true")), "{whose:?}");
                    close(fd);
                    right += 1;
                }
                STALE => refused += 1,
                error => panic!("error {error}"),
            }
            let named = name(AT_FDCWD, path, room, mount_id.0, 0);
            let errors = [libc::ENOENT, libc::EINVAL, libc::EOPNOTSUPP].map(|error| -i64::from(error));
            assert!(named == 0 || errors.contains(&named), "{named}");
            assert!(ground.read(room + 8 + 128, 64).iter().all(|byte| *byte == 0), "written beyond the room");
        }
        assert!(right > 0 && refused > 0, "{right} opened, {refused} refused: no race at all");
    });
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn thousand(ground: &Ground) {
    let mount = folder(ground, ".");
    let (good, start) = (ground.handle(&ground.path("file")), Barrier::new(1000));
    std::thread::scope(|scope| {
        let one = || {
            start.wait();
            let pages = Pages::new();
            let result = open(fd(&mount), pages.put(ground, &good), 0);
            assert!(result >= 0, "{result}");
            close(result);
            assert_eq!(ground.handle(&ground.path("file")), good);
        };
        let all: Vec<_> = (0..1000)
            .map(|_| std::thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, one).unwrap())
            .collect();
        for one in all {
            one.join().unwrap();
        }
    });
}

/// A full table costs nothing but EMFILE, as often as it is tried.
fn full(ground: &Ground) {
    let mount = folder(ground, ".");
    let good = ground.handle(&ground.path("file"));
    let pages = Pages::new();
    let at = pages.put(ground, &good);
    let mut filled = Vec::new();
    while let Ok(copy) = rustix::io::dup(&mount) {
        filled.push(copy);
    }
    for _ in 0..200 {
        assert_eq!(open(fd(&mount), at, 0), -i64::from(libc::EMFILE));
    }
    let freed = fd(&filled.pop().unwrap());
    assert_eq!(open(fd(&mount), at, 0), freed.cast_signed());
}

/// Where every process of [`deaths`] has memory.
const SHARED_ADDRESS: u64 = 0x10_0000_0000;

fn map_shared_address() {
    let kind = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE);
    let rw = number(libc::PROT_READ | libc::PROT_WRITE);
    let at = call(libc::SYS_mmap, [SHARED_ADDRESS, 4096, rw, kind, u64::MAX, 0]);
    assert_eq!(at, SHARED_ADDRESS.cast_signed());
}

/// Callers are killed in mid-call, their ids used again at once by processes that have memory at the same place.
fn deaths(ground: &Ground) {
    let child = |what: &str| {
        let mut command = Command::new("/proc/self/exe");
        command.args(["as-is", what, ground.dir.to_str().unwrap()]).stdin(Stdio::null());
        command
    };
    let (mut ids, mut again) = (std::collections::HashSet::new(), 0);
    for round in 0..150_u64 {
        let mut caller = child("spin").stdout(Stdio::piped()).spawn().unwrap();
        // It calls when it says so.
        std::io::Read::read_exact(&mut caller.stdout.take().unwrap(), &mut [0]).unwrap();
        std::thread::sleep(Duration::from_micros(round * 37 % 1000));
        let bystanders: Vec<_> = (0..2 + round % 3).map(|_| child("bystander").spawn().unwrap()).collect();
        caller.kill().unwrap();
        assert_eq!(caller.wait().unwrap().signal(), Some(libc::SIGKILL));
        let late = child("bystander").spawn().unwrap();
        ids.insert(caller.id());
        for mut bystander in bystanders.into_iter().chain([late]) {
            again += u32::from(ids.contains(&bystander.id()));
            assert!(bystander.wait().unwrap().success(), "round {round}: a bystander's memory changed");
        }
    }
    assert!(again > 0, "no id was used again");
    let good = ground.handle(&ground.path("file"));
    assert_eq!(opened(&folder(ground, "."), &good), 0);
}

fn spin(ground: &Ground) {
    map_shared_address();
    let path = Pages::new();
    let path = path.put(ground, b"file\0");
    std::io::Write::write_all(&mut std::io::stdout(), b"r").unwrap();
    std::io::Write::flush(&mut std::io::stdout()).unwrap();
    loop {
        ground.write(SHARED_ADDRESS, &128_u32.to_ne_bytes());
        assert_eq!(name(AT_FDCWD, path, SHARED_ADDRESS, SHARED_ADDRESS + 2048, 0), 0);
    }
}

fn bystander(ground: &Ground) {
    map_shared_address();
    ground.write(SHARED_ADDRESS, &[0x77; 4096]);
    std::thread::sleep(Duration::from_millis(3));
    assert!(ground.read(SHARED_ADDRESS, 4096).iter().all(|byte| *byte == 0x77));
}

/// The same calls by the numbers of other ABIs: locum does not serve them, and the kernel does not allow them.
fn other_arch(ground: &Ground) {
    const X32: i64 = 0x4000_0000;
    let good = ground.handle(&ground.path("file"));
    let mount = folder(ground, ".");
    let pages = Pages::low();
    let at = pages.put(ground, &good);
    for nr in [libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at, 305] {
        let result = call(nr | X32, [fd(&mount), at, 0, 0, 0, 0]);
        assert!([libc::ENOSYS, libc::EPERM].contains(&i32::try_from(-result).unwrap()), "x32 {nr}: {result}");
    }
    let result = int80(342, [fd(&mount), at, 0]);
    assert!([libc::ENOSYS, libc::EPERM].contains(&i32::try_from(-result).unwrap()), "int 0x80: {result}");
}

/// A handler panics, takes the monitor along or stalls, while others call on.
fn fault(ground: &Ground, kind: &str) {
    let (good, mount) = (ground.handle(&ground.path("file")), folder(ground, "."));
    let (done, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(ground.handle(&ground.path("file")), good);
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let start = Instant::now();
        let error = ground.handle_with(std::path::Path::new(&format!("locum-fault-{kind}")), 0);
        let (took, others) = (start.elapsed(), calls.load(Ordering::Relaxed));
        let goes_on = opened(&mount, &good);
        done.store(true, Ordering::Relaxed);
        assert_eq!(error, Err(IO));
        assert_eq!(goes_on, 0);
        assert!(took < Duration::from_secs(8), "{took:?}");
        assert!(kind != "stall" || others > 100, "{others} other calls in {took:?}");
    });
}

/// Gives its listener to `door` with the pid of somebody else's process, then calls.
fn foreign_pid(ground: &Ground, door: &str) {
    let calls = locum_kernel::arch::CALLS.iter().map(|(_, nr)| *nr).collect::<Vec<_>>();
    let listener = Filter::notify(&calls).install(Wait::Killable).unwrap();
    let state = r#"{"ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": 1, "metadata": "policy=theirs",
        "state": {"ociVersion": "1.0.2", "id": "foreign", "status": "creating", "pid": 1, "bundle": "/"}}"#;
    let socket = std::os::unix::net::UnixStream::connect(door).unwrap();
    let descriptors = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let bytes = [std::io::IoSlice::new(state.as_bytes())];
    let sent = rustix::net::sendmsg(&socket, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, state.len());
    drop((socket, listener));
    let handle = ground.handle_with(&ground.path("file"), 0);
    println!("{}", handle.map_or_else(told, |handle| hex(&handle)));
}
