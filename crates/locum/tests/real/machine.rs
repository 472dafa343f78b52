//! The guest: QEMU without KVM, Debian's kernel, and an initramfs whose only process does the work.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::common::Process;
use crate::components::{self, run};
use crate::tree::{self, Listing};

/// Far more than it needs, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(300);

/// In the order in which init loads them.
const MODULES: [&str; 7] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "fuse",
    "virtiofs",
];

/// Makes the guest's first file system, `folder/initrd`, with `tar` for it to unpack.
pub(crate) fn initramfs(folder: &Path, tar: &Path) {
    let root = folder.join("initramfs");
    for part in ["bin", "modules"] {
        fs::create_dir_all(root.join(part)).unwrap();
    }
    let commands = folder.join("commands");
    for command in ["busybox", "xattr"] {
        fs::copy(commands.join(command), root.join("bin").join(command)).unwrap();
    }
    components::modules(&MODULES, &root.join("modules"));
    for name in ["init", "work.sh", "migrate.sh", "list.sh"] {
        fs::copy(tree::script(name), root.join(name)).unwrap();
    }
    fs::copy(tar, root.join("tree.tar")).unwrap();
    run(Command::new("chmod").arg("755").arg(root.join("init")));
    let pack = "find . | cpio --quiet --create --format=newc > ../initrd";
    run(Command::new("sh").args(["-ec", pack]).current_dir(&root));
}

/// Boots the guest on the share behind `socket` and returns its listing once it has done its work. It checks that it cannot
/// read what only the host's root may if its virtiofsd is `unprivileged`.
pub(crate) fn work(folder: &Path, socket: &Path, unprivileged: bool) -> Listing {
    let environment = format!("work=work.sh unprivileged={unprivileged}");
    finish(&mut start(folder, socket, &environment, &[]), folder)
}

/// Starts a guest on the share behind `socket`, with init's environment and more arguments for QEMU.
pub(crate) fn start(folder: &Path, socket: &Path, environment: &str, more: &[&str]) -> Process {
    let at = |name| folder.join(name).display().to_string();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-smp", "1"])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none"])
        .args(["-serial", &format!("file:{}", at("console")), "-serial", &format!("file:{}", at("listing"))])
        .args(["-object", "memory-backend-memfd,id=memory,size=512M,share=on", "-numa", "node,memdev=memory"])
        .args(["-chardev", &format!("socket,id=share,path={}", socket.display())])
        .args(["-device", "vhost-user-fs-pci,queue-size=1024,chardev=share,tag=share"])
        .arg("-kernel")
        .arg(components::vmlinuz())
        .args(["-initrd", &at("initrd"), "-append"])
        // The kernel hands a parameter that it does not know to init, as an environment variable.
        .arg(format!("console=ttyS0 quiet panic=-1 random.trust_cpu=on {environment}"))
        .args(more);
    Process(qemu.stdin(Stdio::null()).spawn().unwrap())
}

/// The guest's listing, once it has done its work.
pub(crate) fn finish(qemu: &mut Process, folder: &Path) -> Listing {
    let ended = ends_within(qemu, PATIENCE);
    let said = said(folder);
    assert!(ended, "the guest does not end; it said:\n{said}");
    assert!(qemu.0.wait().unwrap().success() && said.contains("guest: good"), "the guest said:\n{said}");
    let listing = fs::read_to_string(folder.join("listing")).unwrap();
    tree::lines(listing.trim_end().strip_suffix("guest: good").expect("a listing that was cut off"))
}

/// What the guest said so far.
pub(crate) fn said(folder: &Path) -> String {
    String::from_utf8_lossy(&fs::read(folder.join("console")).unwrap_or_default()).into_owned()
}

pub(crate) fn ends_within(process: &Process, limit: Duration) -> bool {
    let pid = Pid::from_raw(process.pid().cast_signed()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap() == 1
}
