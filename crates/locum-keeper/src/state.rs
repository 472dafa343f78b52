//! The runtime's message, the OCI `ContainerProcessState`, as far as the keeper has to read it. A runtime may keep the
//! connection open while the container runs, so only the JSON itself tells where it ends.

use serde::Deserialize;

/// Looks for the end of a JSON object that comes in pieces; each byte is looked at once.
#[derive(Debug, Default)]
pub(crate) struct Scanner {
    seen: usize,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

/// What came is no JSON object.
#[derive(Debug, thiserror::Error)]
#[error("wanted a JSON object, found the byte {0:#04x} first")]
pub(crate) struct NotAnObject(u8);

impl Scanner {
    /// Whether the object is whole in `bytes`, which begin with those of the last time, and where it ends.
    pub(crate) fn end(&mut self, bytes: &[u8]) -> Result<Option<usize>, NotAnObject> {
        for byte in &bytes[self.seen..] {
            self.seen += 1;
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'{' | b'[' => self.depth += 1,
                b' ' | b'\t' | b'\n' | b'\r' if self.depth == 0 => {}
                _ if self.depth == 0 => return Err(NotAnObject(*byte)),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Ok(Some(self.seen));
                    }
                }
                b'"' => self.in_string = true,
                _ => {}
            }
        }
        Ok(None)
    }
}

/// A message.
#[derive(Debug, Deserialize)]
pub(crate) struct State {
    #[serde(default)]
    pub(crate) fds: Vec<String>,
    #[serde(default)]
    pub(crate) metadata: Option<String>,
    #[serde(rename = "state")]
    pub(crate) container: Container,
}

/// The container in it.
#[derive(Debug, Deserialize)]
pub(crate) struct Container {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) status: String,
    /// 0 in what crun says of an exec.
    #[serde(default)]
    pub(crate) pid: i64,
}

impl State {
    /// Whether this is the start of a container, and no exec into one.
    pub(crate) fn is_start(&self) -> bool {
        matches!(self.container.status.as_str(), "creating" | "created")
    }

    /// The container's first process; 0 if the runtime did not say.
    pub(crate) fn pid(&self) -> u32 {
        u32::try_from(self.container.pid).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_found_whatever_the_pieces() {
        let text = br#" {"a":"}\"]\\","b":[{},{"c":"\u007d"}]} {"second":1}"#;
        let wanted = text.len() - br#" {"second":1}"#.len();
        for piece in 1..text.len() {
            let mut scanner = Scanner::default();
            let mut ends = (1..=text.len()).filter(|end| end % piece == 0 || *end == text.len());
            let found = ends.find_map(|end| scanner.end(&text[..end]).unwrap());
            assert_eq!(found, Some(wanted), "pieces of {piece}");
        }
    }

    #[test]
    fn whatever_a_parser_takes_ends_where_the_scanner_says() {
        let pieces = ["{", "}", "{}", "[", "]", "\"a\":", "\"}\\\"{\"", "\"\\\\\"", ",", "1", " ", "\n"];
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: usize| {
            // xorshift64: only variety is wanted.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            usize::try_from(random >> 33).unwrap() % below
        };
        let mut whole = 0;
        for _ in 0..200_000 {
            let text: String =
                ["{"].into_iter().chain((0..next(10)).map(|_| pieces[next(pieces.len())])).collect();
            let mut parser = serde_json::Deserializer::from_str(&text).into_iter::<serde::de::IgnoredAny>();
            if let Some(Ok(_)) = parser.next() {
                whole += 1;
                assert_eq!(
                    Scanner::default().end(text.as_bytes()).unwrap(),
                    Some(parser.byte_offset()),
                    "{text}"
                );
            }
        }
        assert!(whole > 1000, "only {whole} were JSON");
    }

    #[test]
    fn what_is_no_object_is_known_by_its_first_byte() {
        for text in ["x", "  5", "\"{\"", "}", "\0"] {
            assert!(Scanner::default().end(text.as_bytes()).is_err(), "{text:?}");
        }
        assert_eq!(Scanner::default().end(b" \n").unwrap(), None);
        assert_eq!(Scanner::default().end(b"{\"a\":[").unwrap(), None);
    }

    #[test]
    fn what_runtimes_send_is_understood() {
        let crun = r#"{ "ociVersion": "0.2.0", "fds": [ "seccompFd" ], "pid": 0, "metadata": "m",
            "state": { "ociVersion": "0.2.0", "id": "c1", "status": "running", "pid": 0, "bundle": "." } }"#;
        let state: State = serde_json::from_str(crun).unwrap();
        assert_eq!((state.is_start(), state.pid(), state.container.id.as_str()), (false, 0, "c1"));
        let runc = r#"{"ociVersion":"1.0.2-dev","fds":["seccompFd"],"pid":7,"state":{"id":"c","status":"creating","pid":7}}"#;
        let state: State = serde_json::from_str(runc).unwrap();
        assert_eq!((state.is_start(), state.pid(), state.metadata), (true, 7, None));
    }
}
