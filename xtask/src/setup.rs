//! The real components that the tests work with, from Debian's packages and crates.io: installed once, looked at every time.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::step::{command, log, quietly, real, run, step};

const PACKAGES: [&str; 22] = [
    "gcc",
    "gdb",
    "libc6-dev",
    "crun",
    "runc",
    "podman",
    "conmon",
    "catatonit",
    "slirp4netns",
    "uidmap",
    "fuse-overlayfs",
    "busybox-static",
    "cpio",
    "stress-ng",
    "strace",
    "e2fsprogs",
    "xfsprogs",
    "btrfs-progs",
    "libcap-ng-dev",
    "libseccomp-dev",
    "debootstrap",
    "systemd-container",
];

/// The first QEMU in Debian's packages whose virtio-fs devices migrate (they do since 8.2), and where Debian 12 has it.
const QEMU: (&str, &str) = ("1:10", "bookworm-backports");

const VIRTIOFSD: &str = "1.14.0";

/// The user under whom rootless containers run. It owns nothing outside a test's own folders.
const USER: &str = "locum-test";

/// Everything; quick when it is there.
pub(crate) fn all() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the tests start containers and mount file systems: run this as root"
    );
    ensure!(Path::new("/usr/bin/apt-get").exists(), "setting up needs Debian's apt-get");
    fs::create_dir_all(real())?;
    tools()?;
    packages()?;
    qemu()?;
    user()?;
    virtiofsd()?;
    kernel()?;
    systemd()
}

/// Rust's own tools, which a minimal toolchain lacks.
fn tools() -> Result<()> {
    for (tool, component) in [("clippy", "clippy"), ("fmt", "rustfmt")] {
        if !works(command("cargo", &[tool, "--version"])) {
            run(&format!("install {component}"), &mut command("rustup", &["component", "add", component]))?;
        }
    }
    if !works(command("cargo", &["deny", "--version"])) {
        run("install cargo-deny", &mut command("cargo", &["install", "cargo-deny", "--locked"]))?;
    }
    Ok(())
}

fn works(mut command: Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn packages() -> Result<()> {
    let missing: Vec<&str> = PACKAGES.into_iter().filter(|package| !is_there(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    run("apt-get update", &mut command("apt-get", &["update"]))?;
    let mut install = command("apt-get", &["install", "-y", "--no-install-recommends"]);
    run("apt-get install", install.args(missing).env("DEBIAN_FRONTEND", "noninteractive"))
}

fn is_there(package: &str) -> bool {
    asked("dpkg-query", &["--show", "--showformat=${db:Status-Status}", package]) == "installed"
}

/// What a command said; nothing if it failed.
fn asked(program: &str, args: &[&str]) -> String {
    let output = command(program, args).output().ok().filter(|output| output.status.success());
    output.map_or_else(String::new, |output| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where apt has the packages of `suite` from.
fn host(suite: &str) -> Option<String> {
    let targets = asked(
        "apt-get",
        &["indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages", "Component: main"],
    );
    targets.lines().find_map(|line| Some(line.strip_prefix(suite)?.strip_prefix(' ')?.to_owned()))
}

/// One QEMU for all tests, from Debian's backports. **A change of the machine that stays**: an apt source for that suite, beside the
/// others and on the same host as they. apt takes nothing from backports that it is not told to.
fn qemu() -> Result<()> {
    let (wanted, suite) = QEMU;
    let found = asked("dpkg-query", &["--show", "--showformat=${Version}", "qemu-system-x86"]);
    if works(command("dpkg", &["--compare-versions", &found, "ge", wanted])) {
        return Ok(());
    }
    if host(suite).is_none() {
        let Some(host) = host("bookworm") else {
            bail!(
                "QEMU: wanted version {wanted} or newer, found {found:?}, and apt knows no Debian 12 to take it from: install it"
            );
        };
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let source = format!("/etc/apt/sources.list.d/{suite}.list");
        fs::write(&source, format!("deb [signed-by={keyring}] {host} {suite} main\n"))
            .with_context(|| format!("write {source}"))?;
    }
    run("apt-get update (QEMU)", &mut command("apt-get", &["update"]))?;
    let mut install =
        command("apt-get", &["install", "-y", "--no-install-recommends", "-t", suite, "qemu-system-x86"]);
    run("apt-get install (QEMU)", install.env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Gets its ranges of subordinate ids by itself.
fn user() -> Result<()> {
    if works(command("id", &[USER])) {
        return Ok(());
    }
    run("add user", &mut command("useradd", &["--no-create-home", "--home-dir", "/nonexistent", USER]))
}

fn virtiofsd() -> Result<()> {
    let (root, build) = (real().join("virtiofsd"), real().join("build"));
    if root.join("bin/virtiofsd").exists() {
        return Ok(());
    }
    let mut install =
        command("cargo", &["install", "virtiofsd", "--version", VIRTIOFSD, "--locked", "--root"]);
    run("build virtiofsd", install.arg(&root).env("CARGO_TARGET_DIR", &build))?;
    fs::remove_dir_all(&build).with_context(|| format!("remove {}", build.display()))
}

/// Debian's kernel for virtual machines, unpacked and not installed.
fn kernel() -> Result<()> {
    let kernel = real().join("kernel");
    if kernel.exists() {
        return Ok(());
    }
    step("fetch kernel", || {
        let log = log("fetch kernel")?;
        let depends = command("apt-cache", &["depends", "linux-image-cloud-amd64"]).output()?;
        let depends = String::from_utf8(depends.stdout)?;
        let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
        let package =
            package.context("linux-image-cloud-amd64 depends on no kernel: is apt's list up to date?")?;
        let work = real().join("fetch");
        fs::create_dir_all(&work)?;
        let mut download = Command::new("apt-get");
        // apt's own user cannot write here, which it would warn about.
        download.args(["-o", "APT::Sandbox::User=root", "download", &format!("linux-image-{package}")]);
        quietly(&log, download.current_dir(&work))?;
        let Some(deb) = fs::read_dir(&work)?.next() else { bail!("apt-get download left nothing") };
        let unpacked = work.join("unpacked");
        quietly(&log, Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(&unpacked))?;
        fs::rename(&unpacked, &kernel)?;
        fs::remove_dir_all(&work).context("clean up")
    })
}

/// A Debian with systemd, of this machine's release so that what is built here runs there, to be booted in a container.
fn systemd() -> Result<()> {
    let tree = real().join("systemd");
    if tree.exists() {
        return Ok(());
    }
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite = suite.context("/etc/os-release names no VERSION_CODENAME")?;
    let host = host(suite).with_context(|| format!("apt knows no host for Debian {suite}"))?;
    let fresh = tree.with_extension("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).with_context(|| format!("remove {}", fresh.display()))?;
    }
    let mut bootstrap =
        command("debootstrap", &["--variant=minbase", "--include=systemd,systemd-sysv,dbus", suite]);
    run("debootstrap", bootstrap.arg(&fresh).arg(host))?;
    fs::rename(&fresh, &tree).with_context(|| format!("rename {}", fresh.display()))
}
