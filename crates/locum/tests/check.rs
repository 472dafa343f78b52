//! `locum check` tells what is there by trying it.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use serde_json::Value;

fn result(findings: &Value, what: &str) -> String {
    let all = findings["findings"].as_array().unwrap();
    let found = all.iter().find(|finding| finding["what"].as_str().unwrap().starts_with(what));
    found.unwrap_or_else(|| panic!("{what} in {findings}"))["result"].as_str().unwrap().to_owned()
}

#[test]
fn root_can_work_here() {
    let keys = tempfile::tempdir().unwrap();
    let keys = keys.path().to_str().unwrap();
    let out = common::locum(&["check", "--json", "--keys", keys]).output().unwrap();
    let findings: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(out.status.success() && findings["works"] == true, "{findings}");
    for what in ["seccomp user notification", "capabilities", "file handles", "keys", "policy"] {
        assert_eq!(result(&findings, what), "yes", "{what}");
    }
    assert!(common::list(keys.as_ref()).is_empty(), "it only looks");
    let plain = common::locum(&["check", "--keys", keys]).output().unwrap();
    assert!(String::from_utf8_lossy(&plain.stdout).ends_with("locum can work here\n"));
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let locum = folder.path().join("locum");
    std::fs::copy(env!("CARGO_BIN_EXE_locum"), &locum).unwrap();
    std::fs::write(folder.path().join("bad.key"), "short").unwrap();
    let mut command = Command::new(locum);
    command.args(["check", "--json", "--policy", "virtiofs", "--keys"]).arg(folder.path());
    let out = command.uid(common::USER).gid(common::USER).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let findings: Value = serde_json::from_slice(&out.stdout).unwrap();
    for what in ["capabilities", "file handles", "keys", "policy"] {
        assert_eq!(result(&findings, what), "no", "{what}: {findings}");
    }
    assert_eq!(result(&findings, "seccomp user notification"), "yes");
}
