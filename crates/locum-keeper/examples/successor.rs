//! Programs in which no keeper should go on: which one is told by the file's name. Tests have a keeper rehearse with them.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

fn main() {
    let name = std::env::current_exe().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let arguments: Vec<String> = std::env::args().collect();
    // Without the last two it is to serve.
    let [_, _, _, from, _, to] = arguments.as_slice() else { panic!("found {arguments:?}") };
    let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
    let answer = |text: &str| {
        let to = locum_kernel::program::inherited(to).unwrap();
        std::fs::File::from(to).write_all(text.as_bytes()).unwrap();
    };
    match name.as_str() {
        "hangs" => loop {
            std::thread::park();
        },
        "crashes" => std::process::abort(),
        "gives-up" => {
            answer(
                r#"{"refused":{"why":"locum 9.9.9 reads snapshots of version 9, found one of version 1"}}"#,
            );
        }
        "babbles" => answer("ready"),
        "forgets" => answer(r#"{"ready":{"release":"9.9.9","descriptors":1,"more":"of it"}}"#),
        // It can be executed once only.
        "vanishes" => {
            while std::fs::metadata("/proc/self/exe").unwrap().permissions().mode() & 0o111 != 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            locum_keeper::rehearse(from, to).unwrap();
        }
        other => panic!("no successor is called {other}"),
    }
}
