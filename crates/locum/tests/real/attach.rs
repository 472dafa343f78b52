//! A container that was started without any profile of locum's is attached, while its virtiofsd serves a guest that writes.

use std::time::Duration;

use serde_json::Value;

use crate::common::{locum, until, until_within};
use crate::components;
use crate::container::{Runtime, Site};
use crate::machine;
use crate::service::Service;
use crate::tree;

#[test]
fn crun() {
    attached(Runtime::Crun);
}

#[test]
fn runc() {
    attached(Runtime::Runc);
}

/// The one that is attached has no filter of its own that kills for seccomp(2), as it has by default: with that it is left as it is.
///
/// virtiofsd looks once, when it starts, whether it can open by handle; without, it keeps a descriptor for each file for good. So the
/// first one, which is attached, must go on undisturbed; the next one in the same container must have handles.
fn attached(runtime: Runtime) {
    let service = Service::new(runtime);
    let _serve = service.serve();
    let site = Site::new(runtime, &Value::Null).with_control_group();
    for name in ["first", "second"] {
        site.share(name);
        tree::special(&site.at("share").join(name), runtime.outside());
    }
    components::commands(&site.at("commands"));
    tree::pack(&site.at("tar"));
    machine::initramfs(site.path(), &site.at("tar"));
    let virtiofsd = |handles: &str, seccomp: &str, name: &str| {
        format!(
            "virtiofsd --seccomp={seccomp} --sandbox=none --inode-file-handles={handles} --xattr --shared-dir /share/{name} \
             --socket-path /run/{name} 2>/run/said-{name} </dev/null"
        )
    };
    let script = format!(
        "{} && {} && cat",
        virtiofsd("prefer", "log", "first"),
        virtiofsd("mandatory", "kill", "second")
    );
    let container = site.start(&script);
    let said = |name: &str| std::fs::read_to_string(site.at(&format!("run/said-{name}"))).unwrap_or_default();
    until("virtiofsd's socket", || site.at("run/first").exists());
    let seen = std::thread::scope(|scope| {
        let guest = scope.spawn(|| machine::work(site.path(), &site.at("run/first"), true));
        let wrote = || std::fs::read_dir(site.at("share/first")).unwrap().count() > 1;
        until_within(Duration::from_secs(120), "a guest that writes", || wrote() || guest.is_finished());
        let mut attach = locum(&["attach", "--container", container.name(), "--runtime-dir"]);
        let out = attach.arg(service.at("runtime")).output().unwrap();
        let told = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert!(!guest.is_finished(), "the guest was done too soon");
        assert!(told.ends_with("2 attached, 0 left as they are\n"), "{told}");
        guest.join().unwrap()
    });
    println!("{runtime:?}, first: {:?}; virtiofsd said: {}", service.counted(), said("first"));
    let expected = tree::expected(&site.at("commands"), &site.at("tar"));
    let on_host = |name: &str| tree::list(&site.at("commands"), &site.at("share").join(name));
    tree::assert_same("the first guest's tree", &seen, &expected);
    tree::assert_same("the first share", &on_host("first"), &expected);

    until("the second virtiofsd's socket", || site.at("run/second").exists());
    let seen = machine::work(site.path(), &site.at("run/second"), true);
    let counted = service.counted();
    container.finish();
    println!("{runtime:?}, second: {counted:?}; virtiofsd said: {}", said("second"));
    tree::assert_same("the second guest's tree", &seen, &expected);
    tree::assert_same("the second share", &on_host("second"), &expected);
    assert!(counted.calls > 1000 && counted.refused == 0, "{counted:?}");
}
