//! QEMU's machine protocol, as far as a migration needs it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::until;

/// A connection to one QEMU.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// All that was said, for whoever has to find out why a test failed.
    pub(crate) heard: String,
}

impl Qmp {
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut stream = None;
        until("QEMU's socket", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut qmp = Self { stream: BufReader::new(stream), heard: String::new() };
        qmp.next("QMP");
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    /// What the command returned. Events are passed over.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let told = json!({"execute": command, "arguments": arguments});
        // In one piece: QEMU acts on the last brace, and what comes after `quit` may find nobody.
        self.stream.get_mut().write_all(told.to_string().as_bytes()).unwrap();
        self.next("return")
    }

    fn next(&mut self, name: &str) -> Value {
        loop {
            let mut line = String::new();
            let read = self.stream.read_line(&mut line);
            self.heard += &line;
            assert!(read.is_ok_and(|bytes| bytes > 0), "QEMU says no {name}, only:\n{}", self.heard);
            let mut message: Value = serde_json::from_str(&line).unwrap();
            assert!(message.get("error").is_none(), "QEMU said:\n{}", self.heard);
            if let Some(found) = message.get_mut(name) {
                return found.take();
            }
        }
    }
}
