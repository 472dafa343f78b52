//! The policy file: TOML, one table for each policy.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::PolicyError;
use crate::policy::{Call, Limits, OPath, Policy};
use crate::scope::Scope;

const POLICY_KEYS: &[&str] =
    &["calls", "exports", "lifeline", "limits", "o_path", "peers", "scope", "trusted"];
const LIMIT_KEYS: &[&str] = &["deadline_ms", "workers"];

/// Reads the policies in `text`, which errors call `file`.
pub fn parse(file: &str, text: &str) -> Result<Vec<Policy>, PolicyError> {
    let reader = Reader { file, text };
    let table = DeTable::parse(text)
        .map_err(|error| reader.error(error.span().unwrap_or(0..0), error.message().trim_end().to_owned()))?;
    let mut tables: Vec<_> = table.get_ref().iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    tables.into_iter().map(|(name, value)| reader.policy(name.get_ref(), name.span(), value)).collect()
}

struct Reader<'a> {
    file: &'a str,
    text: &'a str,
}

type Value<'i> = Spanned<DeValue<'i>>;

impl Reader<'_> {
    fn error(&self, span: Range<usize>, message: String) -> PolicyError {
        PolicyError::at(self.file, self.text, span, message)
    }

    fn policy(&self, name: &str, span: Range<usize>, value: &Value<'_>) -> Result<Policy, PolicyError> {
        if !is_name(name) {
            let message =
                format!("{name:?} is no policy's name: wanted letters, digits, - and _, 64 at most");
            return Err(self.error(span, message));
        }
        let table = self.table(value, "a policy", POLICY_KEYS)?;
        let get = |key: &str| table.get(key);
        let calls = get("calls").map_or_else(|| Ok(Call::ALL.to_vec()), |value| self.calls(value))?;
        let exports = get("exports").map_or_else(|| Ok(Vec::new()), |value| self.exports(value))?;
        let peers = match get("peers") {
            Some(value) => self.each(value, "a list of user ids", |item| {
                let uid = self.integer(item, "a user id", 0..=u64::from(u32::MAX) - 1)?;
                Ok(u32::try_from(uid).unwrap_or(u32::MAX))
            })?,
            None => vec![0],
        };
        let o_path = get("o_path").map_or(Ok(OPath::Exact), |value| self.o_path(value))?;
        let lifeline = get("lifeline").map_or(Ok(true), |value| self.truth(value))?;
        let trusted = get("trusted").map_or_else(|| Ok(Vec::new()), |value| self.trusted(value))?;
        let scope = match get("scope") {
            Some(value) => self.scope(value, &trusted)?,
            None => Scope::container(),
        };
        let limits = get("limits").map_or_else(|| Ok(Limits::default()), |value| self.limits(value))?;
        Ok(Policy { name: name.to_owned(), calls, peers, exports, scope, o_path, lifeline, limits })
    }

    fn calls(&self, value: &Value<'_>) -> Result<Vec<Call>, PolicyError> {
        let names: Vec<_> = Call::ALL.iter().map(|call| call.name()).collect();
        let calls = self.each(value, "a list of calls", |item| {
            let name = self.string(item, "a call's name")?;
            Call::ALL.iter().find(|call| call.name() == name).copied().ok_or_else(|| {
                self.error(item.span(), format!("unknown call {name:?}{}", nearest(name, &names)))
            })
        })?;
        if calls.is_empty() {
            return Err(
                self.error(value.span(), "an empty list of calls: a policy grants at least one".to_owned())
            );
        }
        Ok(calls)
    }

    fn exports(&self, value: &Value<'_>) -> Result<Vec<String>, PolicyError> {
        self.each(value, "a list of paths", |item| {
            let path = self.string(item, "a path")?;
            let is_normal = path == "/"
                || path.strip_prefix('/').is_some_and(|rest| {
                    rest.split('/').all(|part| !matches!(part, "" | "." | "..")) && !rest.contains('\0')
                });
            if !is_normal {
                let message = format!(
                    "the export {path:?} is not a normal absolute path: wanted one like \"/share\", without . and .. \
                     and without a / at the end"
                );
                return Err(self.error(item.span(), message));
            }
            Ok(path.to_owned())
        })
    }

    fn o_path(&self, value: &Value<'_>) -> Result<OPath, PolicyError> {
        let wanted = "\"exact\" or \"fast\"";
        let found = self.string(value, wanted)?;
        let known = [OPath::Exact, OPath::Fast].into_iter().find(|known| known.name() == found);
        known.ok_or_else(|| self.error(value.span(), format!("wanted {wanted}, found {found:?}")))
    }

    fn truth(&self, value: &Value<'_>) -> Result<bool, PolicyError> {
        let truth = value.get_ref().as_bool();
        truth.ok_or_else(|| self.wrong_type(value, "true or false"))
    }

    fn trusted(&self, value: &Value<'_>) -> Result<Vec<String>, PolicyError> {
        self.each(value, "a list of fields", |item| {
            let field = self.string(item, "a field")?;
            let is_known = matches!(field, "container" | "policy")
                || field.strip_prefix("annotation:").is_some_and(|name| !name.is_empty());
            if !is_known {
                let hint = nearest(field, &["container", "policy", "annotation:NAME"]);
                return Err(self.error(item.span(), format!("unknown field {field:?}{hint}")));
            }
            Ok(field.to_owned())
        })
    }

    fn scope(&self, value: &Value<'_>, trusted: &[String]) -> Result<Scope, PolicyError> {
        let template = self.string(value, "a scope template")?;
        let scope = Scope::parse(template)
            .map_err(|message| self.error(value.span(), format!("in the scope template: {message}")))?;
        let untrusted = scope.fields().find(|field| !trusted.contains(field));
        match untrusted {
            Some(field) => Err(self.error(
                value.span(),
                format!(
                    "the scope uses {{{field}}}, which is not in `trusted`: whoever starts the container chooses it; add \
                     {field:?} to `trusted` if the peers may be believed there"
                ),
            )),
            None => Ok(scope),
        }
    }

    fn limits(&self, value: &Value<'_>) -> Result<Limits, PolicyError> {
        let table = self.table(value, "limits", LIMIT_KEYS)?;
        let mut limits = Limits::default();
        if let Some(value) = table.get("workers") {
            limits.workers = u32::try_from(self.integer(value, "workers", 1..=64)?).unwrap_or(64);
        }
        if let Some(value) = table.get("deadline_ms") {
            limits.deadline_ms = self.integer(value, "milliseconds", 100..=600_000)?;
        }
        Ok(limits)
    }

    fn table<'v, 'i>(
        &self,
        value: &'v Value<'i>,
        what: &str,
        keys: &[&str],
    ) -> Result<&'v DeTable<'i>, PolicyError> {
        let table =
            value.get_ref().as_table().ok_or_else(|| self.wrong_type(value, &format!("{what}, a table")))?;
        for key in table.keys() {
            let name: &str = key.get_ref();
            if !keys.contains(&name) {
                return Err(
                    self.error(key.span(), format!("unknown key {name:?} in {what}{}", nearest(name, keys)))
                );
            }
        }
        Ok(table)
    }

    fn each<T>(
        &self,
        value: &Value<'_>,
        what: &str,
        read: impl Fn(&Value<'_>) -> Result<T, PolicyError>,
    ) -> Result<Vec<T>, PolicyError> {
        let items = value.get_ref().as_array().ok_or_else(|| self.wrong_type(value, what))?;
        items.iter().map(read).collect()
    }

    fn string<'v>(&self, value: &'v Value<'_>, what: &str) -> Result<&'v str, PolicyError> {
        value.get_ref().as_str().ok_or_else(|| self.wrong_type(value, &format!("{what}, a string")))
    }

    fn integer(
        &self,
        value: &Value<'_>,
        what: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<u64, PolicyError> {
        let integer = value
            .get_ref()
            .as_integer()
            .ok_or_else(|| self.wrong_type(value, &format!("{what}, a number")))?;
        let number = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
        number
            .and_then(|number| u64::try_from(number).ok())
            .filter(|number| range.contains(number))
            .ok_or_else(|| {
                let (from, to) = (range.start(), range.end());
                self.error(
                    value.span(),
                    format!("wanted {what} from {from} to {to}, found {}", integer.as_str()),
                )
            })
    }

    fn wrong_type(&self, value: &Value<'_>, wanted: &str) -> PolicyError {
        let found = value.get_ref().type_str();
        let article = if found.starts_with(['a', 'i']) { "an" } else { "a" };
        self.error(value.span(), format!("wanted {wanted}, found {article} {found}"))
    }
}

/// Whether `name` can be a policy's: it is also part of a file's name.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=64).contains(&name.len()) && name.bytes().all(fits)
}

fn nearest(name: &str, known: &[&str]) -> String {
    let best = known.iter().map(|key| (strsim::damerau_levenshtein(name, key), key)).min();
    match best {
        Some((distance, key)) if distance <= key.len() / 2 => format!("; did you mean {key:?}?"),
        _ => format!("; wanted one of {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::builtin;

    fn error(text: &str) -> String {
        parse("p.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut policy = builtin().remove(0);
        assert_eq!(parse("p", &policy.to_toml()).unwrap(), [policy.clone()]);
        policy.exports = vec!["/with \"quotes\" and\ttab".to_owned()];
        policy.scope = Scope::parse("x{annotation:a.b/c}{policy}").unwrap();
        policy.limits = Limits { workers: 3, deadline_ms: 250 };
        policy.peers = vec![0, 1000];
        assert_eq!(parse("p", &policy.to_toml()).unwrap(), [policy]);
    }

    #[test]
    fn an_empty_table_is_the_default_without_exports() {
        let parsed = parse("p", "[a]\n[b]\nexports = ['/']").unwrap();
        assert_eq!(parsed[0].exports, [""; 0]);
        assert_eq!(parsed[1].exports, ["/"]);
        assert_eq!(parsed[0].peers, [0]);
        assert_eq!(parsed[0].calls, Call::ALL);
    }

    #[test]
    fn errors_point() {
        for (text, wanted) in [
            (
                "[a]\nexport = []",
                "p.toml:2:1: unknown key \"export\" in a policy; did you mean \"exports\"?\n  |\n2 | export = []\n  | ^^^^^^",
            ),
            (
                "[a]\nzzzzzzzz = 1",
                "p.toml:2:1: unknown key \"zzzzzzzz\" in a policy; wanted one of calls, exports, lifeline, limits, o_path, peers, scope, trusted\n  |\n2 | zzzzzzzz = 1\n  | ^^^^^^^^",
            ),
            ("a = 1", "p.toml:1:5: wanted a policy, a table, found an integer\n  |\n1 | a = 1\n  |     ^"),
            (
                "[a]\ncalls = ['open_by_handle']",
                "p.toml:2:10: unknown call \"open_by_handle\"; did you mean \"open_by_handle_at\"?\n  |\n2 | calls = ['open_by_handle']\n  |          ^^^^^^^^^^^^^^^^",
            ),
            (
                "[a]\ncalls = []",
                "p.toml:2:9: an empty list of calls: a policy grants at least one\n  |\n2 | calls = []\n  |         ^^",
            ),
            (
                "[a]\nexports = ['share']",
                "p.toml:2:12: the export \"share\" is not a normal absolute path: wanted one like \"/share\", without . and .. and without a / at the end\n  |\n2 | exports = ['share']\n  |            ^^^^^^^",
            ),
            (
                "[a]\no_path = 'slow'",
                "p.toml:2:10: wanted \"exact\" or \"fast\", found \"slow\"\n  |\n2 | o_path = 'slow'\n  |          ^^^^^^",
            ),
            (
                "[a]\nscope = '{container}'",
                "p.toml:2:9: the scope uses {container}, which is not in `trusted`: whoever starts the container chooses it; add \"container\" to `trusted` if the peers may be believed there\n  |\n2 | scope = '{container}'\n  |         ^^^^^^^^^^^^^",
            ),
            (
                "[a]\ntrusted = 5",
                "p.toml:2:11: wanted a list of fields, found an integer\n  |\n2 | trusted = 5\n  |           ^",
            ),
            (
                "[a]\ntrusted = ['contianer']",
                "p.toml:2:12: unknown field \"contianer\"; did you mean \"container\"?\n  |\n2 | trusted = ['contianer']\n  |            ^^^^^^^^^^^",
            ),
            (
                "[a]\nscope = '{node}'",
                "p.toml:2:9: in the scope template: unknown field {node}: wanted {container}, {policy} or {annotation:NAME}\n  |\n2 | scope = '{node}'\n  |         ^^^^^^^^",
            ),
            (
                "[a]\nscope = 'x}'",
                "p.toml:2:9: in the scope template: a } without its {\n  |\n2 | scope = 'x}'\n  |         ^^^^",
            ),
            (
                "[a.limits]\nworkers = 0",
                "p.toml:2:11: wanted workers from 1 to 64, found 0\n  |\n2 | workers = 0\n  |           ^",
            ),
            (
                "[a]\npeers = [-1]",
                "p.toml:2:10: wanted a user id from 0 to 4294967294, found -1\n  |\n2 | peers = [-1]\n  |          ^^",
            ),
            (
                "['a/b']",
                "p.toml:1:2: \"a/b\" is no policy's name: wanted letters, digits, - and _, 64 at most\n  |\n1 | ['a/b']\n  |  ^^^^^",
            ),
        ] {
            assert_eq!(error(text), wanted, "for {text}");
        }
        assert!(error("[a]\npeers = [").starts_with("p.toml:2:"), "{}", error("[a]\npeers = ["));
        assert!(error("[a]\n[a]").starts_with("p.toml:2:"), "{}", error("[a]\n[a]"));
    }

    #[test]
    fn nothing_that_a_file_can_hold_panics() {
        // A fixed sequence of changes to a good file: each byte dropped, doubled and replaced.
        let good = "[é]\n".to_owned() + &builtin().remove(0).to_toml();
        for at in 0..good.len() {
            for change in [&b""[..], b"\"", b"{", b"\n", b"\0", "é".as_bytes(), b"[[", b"9999999999999999999"]
            {
                let mut bytes = good.clone().into_bytes();
                bytes.splice(at..=at, change.iter().copied());
                if let Err(error) = parse("f", &String::from_utf8_lossy(&bytes)) {
                    let _ = error.to_string();
                }
            }
        }
    }
}
