//! A guest works on a share that an unprivileged virtiofsd serves.

use std::process::{Command, Stdio};

use crate::common::{Process, until};
use crate::components;
use crate::machine;
use crate::tree::{self, Work};

/// The test itself is right: with a privileged virtiofsd and without locum the guest does its work.
#[test]
fn reference() {
    let folder = components::folder();
    let at = |name| folder.path().join(name);
    components::commands(&at("commands"));
    tree::pack(&at("tar"));
    machine::initramfs(folder.path(), &at("tar"));
    std::fs::create_dir(at("share")).unwrap();
    let mut virtiofsd = Command::new(components::virtiofsd());
    virtiofsd.args(["--sandbox=none", "--inode-file-handles=mandatory", "--modcaps=+dac_read_search", "--xattr"]);
    virtiofsd.arg("--shared-dir").arg(at("share")).arg("--socket-path").arg(at("socket"));
    let mut virtiofsd = Process(virtiofsd.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    until("virtiofsd's socket", || at("socket").exists());
    let seen = machine::work(folder.path(), &at("socket"), Work::All);
    assert!(virtiofsd.0.wait().unwrap().success());
    let expected = tree::expected(&at("commands"), Work::All, &at("tar"));
    tree::assert_same("the guest's tree", &seen, &expected);
    tree::assert_same("the share", &tree::list(&at("commands"), &at("share")), &expected);
}
