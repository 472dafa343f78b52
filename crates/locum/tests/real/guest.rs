//! A guest works on a share that an unprivileged virtiofsd serves.

use std::process::{Command, Stdio};

use crate::common::{Process, until};
use crate::components;
use crate::container::{Runtime, Site};
use crate::machine;
use crate::service::{Service, Victim, while_killing};
use crate::tree;

/// The test itself is right: with a privileged virtiofsd and without locum the guest does its work.
#[test]
fn reference() {
    let folder = components::folder();
    let at = |name| folder.path().join(name);
    components::commands(&at("commands"));
    tree::pack(&at("tar"));
    machine::initramfs(folder.path(), &at("tar"));
    std::fs::create_dir(at("share")).unwrap();
    tree::special(&at("share"), 0);
    let mut virtiofsd = Command::new(components::virtiofsd());
    virtiofsd.args([
        "--sandbox=none",
        "--inode-file-handles=mandatory",
        "--modcaps=+dac_read_search",
        "--xattr",
    ]);
    virtiofsd.arg("--shared-dir").arg(at("share")).arg("--socket-path").arg(at("socket"));
    let mut virtiofsd = Process(virtiofsd.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    until("virtiofsd's socket", || at("socket").exists());
    let seen = machine::work(folder.path(), &at("socket"), false);
    assert!(virtiofsd.0.wait().unwrap().success());
    let expected = tree::expected(&at("commands"), &at("tar"));
    tree::assert_same("the guest's tree", &seen, &expected);
    tree::assert_same("the share", &tree::list(&at("commands"), &at("share")), &expected);
}

#[test]
fn crun() {
    served(Runtime::Crun, "prefer", Victim::Monitor);
}

#[test]
fn runc() {
    served(Runtime::Runc, "prefer", Victim::Monitor);
}

#[test]
fn podman() {
    served(Runtime::Podman, "prefer", Victim::Monitor);
}

#[test]
fn crun_mandatory() {
    served(Runtime::Crun, "mandatory", Victim::Monitor);
}

#[test]
fn runc_mandatory() {
    served(Runtime::Runc, "mandatory", Victim::Monitor);
}

#[test]
fn podman_mandatory() {
    served(Runtime::Podman, "mandatory", Victim::Monitor);
}

#[test]
fn crun_everything_lost() {
    served(Runtime::Crun, "mandatory", Victim::Everything);
}

#[test]
fn podman_everything_lost() {
    served(Runtime::Podman, "mandatory", Victim::Everything);
}

/// virtiofsd in a container, without privileges; the guest does its work while the monitor is killed.
fn served(runtime: Runtime, handles: &str, victim: Victim) {
    let service = Service::new(runtime);
    let _serve = service.serve();
    let site = Site::new(runtime, &service.seccomp());
    tree::special(&site.at("share"), runtime.outside());
    components::commands(&site.at("commands"));
    tree::pack(&site.at("tar"));
    machine::initramfs(site.path(), &site.at("tar"));
    // The session lives on until it has been looked at: `cat` waits for the end of the input.
    let virtiofsd = format!(
        "virtiofsd --sandbox=none --inode-file-handles={handles} --xattr --shared-dir /share --socket-path /run/socket \
         2>/run/said </dev/null && cat"
    );
    let container = site.start(&virtiofsd);
    let said = || std::fs::read_to_string(site.at("run/said")).unwrap_or_default();
    let (seen, kills, counted) = while_killing(&service, victim, || {
        until("virtiofsd's socket", || site.at("run/socket").exists());
        machine::work(site.path(), &site.at("run/socket"), true)
    });
    container.finish();
    println!("{runtime:?}, {handles}: {kills} kills, {counted:?}; virtiofsd said: {}", said());

    let expected = tree::expected(&site.at("commands"), &site.at("tar"));
    tree::assert_same("the guest's tree", &seen, &expected);
    tree::assert_same("the share", &tree::list(&site.at("commands"), &site.at("share")), &expected);
    assert!(kills >= 20, "{kills} kills");
    assert!(counted.calls > 1000 && counted.recovered >= 1 && counted.refused == 0, "{counted:?}");
}
