//! The seccomp profile that hands a policy's calls to locum, made from a runtime's default profile.
//!
//! The base is in the format of containers-common and Docker. Nothing in it changes but the policy's calls: they are taken out
//! of every rule that names them, and one rule hands them to the listener.

use serde_json::{Map, Value, json};

use crate::policy::Policy;

/// Who is to read the profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// crun: `linux.seccomp` of an OCI config.json, with WAIT_KILLABLE_RECV.
    Crun,
    /// runc: the same without flags. 1.1 refuses any, and none before 1.5 knows this one.
    Runc,
    /// `podman --security-opt seccomp=FILE`: the format of the base. No flags: podman passes them on, but its runtime may be
    /// runc, which then starts nothing.
    Podman,
}

/// Why no profile can be made.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Not JSON.
    #[error("the base profile is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Not such a profile.
    #[error(
        "the base profile: wanted {wanted} at {at}, found {found}; wanted a file such as /usr/share/containers/seccomp.json"
    )]
    Form {
        /// What should be there.
        wanted: &'static str,
        /// Where.
        at: String,
        /// What is there instead.
        found: String,
    },
}

/// The oldest kernel that locum runs on: rules for kernels up to it apply.
const OLDEST_KERNEL: (u64, u64) = (5, 14);

/// Merges the calls of `policy` into the profile `base`, for `runtime`, whose listener is at `listener_path`.
pub fn merge(
    base: &str,
    policy: &Policy,
    runtime: Runtime,
    listener_path: &str,
) -> Result<Value, ProfileError> {
    let mut profile: Value = serde_json::from_str(base)?;
    let calls: Vec<&str> = policy.calls.iter().map(|call| call.name()).collect();
    let fields = object(&mut profile, "the top")?;
    if !fields.get("defaultAction").is_some_and(Value::is_string) {
        return Err(form(
            "a string",
            "defaultAction",
            fields.get("defaultAction").map_or_else(nothing, kind),
        ));
    }
    let rules = fields.entry("syscalls").or_insert(Value::Null);
    let found = kind(rules);
    let rules = rules.as_array_mut().ok_or_else(|| form("a list of rules", "syscalls", found))?;
    for (index, rule) in rules.iter_mut().enumerate() {
        let at = format!("syscalls[{index}]");
        let rule = object(rule, &at)?;
        check(rule, &at)?;
        take_out(rule, &calls);
    }
    rules.retain(|rule| rule.get("names").and_then(Value::as_array).is_none_or(|names| !names.is_empty()));
    rules.push(json!({"names": calls, "action": "SCMP_ACT_NOTIFY", "args": []}));
    let mut profile = if runtime == Runtime::Podman { profile } else { resolve(&profile)? };
    let fields = object(&mut profile, "the top")?;
    fields.insert("listenerPath".to_owned(), json!(listener_path));
    fields.insert("listenerMetadata".to_owned(), json!(format!("policy={}", policy.name)));
    if runtime == Runtime::Crun {
        fields.insert("flags".to_owned(), json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]));
    }
    Ok(profile)
}

/// Refuses a rule that is not wholly understood: a condition that was passed over would make a rule unconditional.
fn check(rule: &Map<String, Value>, at: &str) -> Result<(), ProfileError> {
    const KEYS: &[&str] =
        &["action", "args", "comment", "errno", "errnoRet", "excludes", "includes", "name", "names"];
    known_keys(rule, KEYS, at)?;
    let is_strings = |value: &Value| value.as_array().is_some_and(|items| items.iter().all(Value::is_string));
    let is_objects = |value: &Value| value.as_array().is_some_and(|items| items.iter().all(Value::is_object));
    optional(rule, "name", "a string", at, Value::is_string)?;
    optional(rule, "names", "a list of strings", at, is_strings)?;
    optional(rule, "args", "a list of objects", at, is_objects)?;
    if given(rule, "name") && given(rule, "names") {
        return Err(form("either name or names", at, "both".to_owned()));
    }
    if given(rule, "errno") && !given(rule, "errnoRet") {
        return Err(form("an errnoRet", at, "only an errno".to_owned()));
    }
    if rule.get("action").and_then(Value::as_str) == Some("SCMP_ACT_NOTIFY") {
        return Err(form("no other listener's calls", at, "SCMP_ACT_NOTIFY".to_owned()));
    }
    for condition in ["includes", "excludes"] {
        optional(rule, condition, "an object", at, Value::is_object)?;
        if let Some(listed) = rule.get(condition).and_then(Value::as_object) {
            let at = format!("{at}.{condition}");
            known_keys(listed, &["arches", "caps", "minKernel"], &at)?;
            optional(listed, "arches", "a list of strings", &at, is_strings)?;
            optional(listed, "caps", "a list of strings", &at, is_strings)?;
        }
    }
    Ok(())
}

fn known_keys(fields: &Map<String, Value>, known: &[&str], at: &str) -> Result<(), ProfileError> {
    let unknown = fields.keys().find(|key| !known.contains(&key.as_str()));
    unknown.map_or(Ok(()), |key| Err(form("only keys that locum knows", at, format!("{key:?}"))))
}

/// What is there and neither null nor empty; runtimes take those for absent.
fn given(fields: &Map<String, Value>, key: &str) -> bool {
    fields
        .get(key)
        .is_some_and(|value| !matches!(value, Value::Null) && *value != json!("") && *value != json!([]))
}

fn optional(
    fields: &Map<String, Value>,
    key: &str,
    wanted: &'static str,
    at: &str,
    is_wanted: impl Fn(&Value) -> bool,
) -> Result<(), ProfileError> {
    match fields.get(key) {
        Some(value) if !value.is_null() && !is_wanted(value) => {
            Err(form(wanted, &format!("{at}.{key}"), kind(value)))
        }
        _ => Ok(()),
    }
}

/// Takes `calls` out of a rule. An old form names a single call, as `name`; it becomes the new one.
fn take_out(rule: &mut Map<String, Value>, calls: &[&str]) {
    let is_other = |name: &Value| name.as_str().is_none_or(|name| !calls.contains(&name));
    if let Some(name) = rule.remove("name").filter(|name| !name.as_str().unwrap_or("").is_empty()) {
        rule.insert("names".to_owned(), json!([name]));
    }
    if let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) {
        names.retain(is_other);
    }
}

/// The OCI form of a profile, for a container without capabilities on this architecture.
fn resolve(profile: &Value) -> Result<Value, ProfileError> {
    let mut resolved = Map::new();
    for key in ["defaultAction", "defaultErrnoRet"] {
        if let Some(value) = profile.get(key) {
            resolved.insert(key.to_owned(), value.clone());
        }
    }
    resolved.insert("architectures".to_owned(), architectures(profile));
    let rules = profile.get("syscalls").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut own = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        if !applies(rule, &format!("syscalls[{index}]"))? {
            continue;
        }
        let mut kept = Map::new();
        for key in ["names", "action", "errnoRet"] {
            if let Some(value) = rule.get(key).filter(|value| !value.is_null()) {
                kept.insert(key.to_owned(), value.clone());
            }
        }
        if let Some(args) = rule.get("args").and_then(Value::as_array).filter(|args| !args.is_empty()) {
            kept.insert("args".to_owned(), json!(args));
        }
        own.push(Value::Object(kept));
    }
    resolved.insert("syscalls".to_owned(), Value::Array(own));
    Ok(Value::Object(resolved))
}

fn architectures(profile: &Value) -> Value {
    const NATIVE: &str = "SCMP_ARCH_X86_64";
    if let Some(listed) = profile.get("architectures").filter(|listed| listed.is_array()) {
        return listed.clone();
    }
    let map = profile.get("archMap").and_then(Value::as_array);
    let own = map.and_then(|map| map.iter().find(|entry| entry.get("architecture") == Some(&json!(NATIVE))));
    let sub = own.and_then(|own| own.get("subArchitectures")).and_then(Value::as_array).cloned();
    Value::Array([vec![json!(NATIVE)], sub.unwrap_or_default()].concat())
}

/// Whether a rule is in force for a container without capabilities.
fn applies(rule: &Value, at: &str) -> Result<bool, ProfileError> {
    let list = |condition: &str, key: &str| -> Vec<String> {
        let listed = rule.get(condition).and_then(|condition| condition.get(key)).and_then(Value::as_array);
        listed.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let is_native = |arches: &[String]| arches.iter().any(|arch| matches!(arch.as_str(), "amd64" | "x86_64"));
    let includes_arches = list("includes", "arches");
    let kernel = |condition: &str| -> Result<Option<bool>, ProfileError> {
        match rule.get(condition).and_then(|condition| condition.get("minKernel")) {
            None | Some(Value::Null) => Ok(None),
            Some(version) => {
                let parsed = version.as_str().and_then(|version| version.split_once('.')).and_then(
                    |(major, minor)| {
                        Some((major.parse::<u64>().ok()?, minor.split('.').next()?.parse::<u64>().ok()?))
                    },
                );
                let found = version.to_string();
                let parsed = parsed.ok_or_else(|| {
                    form("a kernel version such as \"4.8\"", &format!("{at}.{condition}.minKernel"), found)
                })?;
                Ok(Some(parsed <= OLDEST_KERNEL))
            }
        }
    };
    Ok(list("includes", "caps").is_empty()
        && (includes_arches.is_empty() || is_native(&includes_arches))
        && !is_native(&list("excludes", "arches"))
        && kernel("includes")? != Some(false)
        && kernel("excludes")? != Some(true))
}

fn object<'v>(value: &'v mut Value, at: &str) -> Result<&'v mut Map<String, Value>, ProfileError> {
    let found = kind(value);
    value.as_object_mut().ok_or_else(|| form("an object", at, found))
}

fn form(wanted: &'static str, at: &str, found: String) -> ProfileError {
    ProfileError::Form { wanted, at: at.to_owned(), found }
}

fn nothing() -> String {
    kind(&Value::Null)
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::policy::builtin;

    /// What both base formats have in them, as far as it matters here.
    const BASE: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
                    {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],
        "syscalls": [
            {"names": ["read", "name_to_handle_at", "write"], "action": "SCMP_ACT_ALLOW", "args": []},
            {"names": ["open_by_handle_at"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_DAC_READ_SEARCH"]}},
            {"names": ["open_by_handle_at", "bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["s390_runtime_instr"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390"]}},
            {"names": ["modify_ldt"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["s390"], "caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "9.1"}},
            {"name": "open_by_handle_at", "action": "SCMP_ACT_KILL"}
        ]}"#;

    fn made(base: &str, runtime: Runtime) -> Value {
        merge(base, &builtin()[0], runtime, "/run/locum/oci.sock").unwrap()
    }

    /// For each call, every rule that names it, less its names.
    fn by_call(profile: &Value) -> BTreeMap<String, Vec<Value>> {
        let mut calls: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for rule in profile["syscalls"].as_array().unwrap() {
            let mut rest = rule.clone();
            rest.as_object_mut().unwrap().remove("names");
            let single = rest.as_object_mut().unwrap().remove("name");
            let names = rule["names"].as_array().cloned().unwrap_or_else(|| single.into_iter().collect());
            for name in names {
                calls.entry(name.as_str().unwrap().to_owned()).or_default().push(rest.clone());
            }
        }
        calls
    }

    fn only_the_named_calls_change(base: &str) {
        let mut before = by_call(&serde_json::from_str(base).unwrap());
        let mut after = by_call(&made(base, Runtime::Podman));
        let notify = json!({"action": "SCMP_ACT_NOTIFY", "args": []});
        for call in ["name_to_handle_at", "open_by_handle_at"] {
            assert!(before.remove(call).is_some(), "{call} is not in the base: this test would test nothing");
            assert_eq!(after.remove(call), Some(vec![notify.clone()]));
        }
        assert_eq!(before, after);
    }

    #[test]
    fn every_other_call_keeps_every_rule() {
        only_the_named_calls_change(BASE);
    }

    /// The profile of Debian's golang-github-containers-common, which the test setup installs.
    #[test]
    fn in_the_profile_of_containers_common_too() {
        let base = std::fs::read_to_string("/usr/share/containers/seccomp.json")
            .expect("containers-common is installed");
        only_the_named_calls_change(&base);
    }

    #[test]
    fn the_oci_form_is_that_of_a_container_without_capabilities() {
        let profile = made(BASE, Runtime::Crun);
        assert_eq!(profile["flags"], json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]));
        assert_eq!(profile["architectures"], json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]));
        assert_eq!(profile["listenerMetadata"], "policy=virtiofsd");
        assert_eq!(profile["defaultErrnoRet"], 38);
        let calls = by_call(&profile);
        let present: Vec<&str> = calls.keys().map(String::as_str).collect();
        let wanted = [
            "bpf",
            "clone",
            "modify_ldt",
            "name_to_handle_at",
            "open_by_handle_at",
            "personality",
            "ptrace",
            "read",
            "write",
        ];
        assert_eq!(present, wanted);
        assert_eq!(calls["bpf"], [json!({"action": "SCMP_ACT_ERRNO", "errnoRet": 1})]);
        assert!(made(BASE, Runtime::Runc).get("flags").is_none());
        assert!(profile.get("archMap").is_none());
    }

    #[test]
    fn what_is_no_profile_is_an_error_that_says_where() {
        let error = |base: &str| merge(base, &builtin()[0], Runtime::Crun, "/s").unwrap_err().to_string();
        assert!(error("[]").contains("wanted an object at the top, found a list"));
        assert!(error("{}").contains("wanted a string at defaultAction, found nothing"));
        assert!(
            error(r#"{"defaultAction": "A"}"#).contains("wanted a list of rules at syscalls, found nothing")
        );
        for (rule, wanted) in [
            ("7", "wanted an object at syscalls[0], found a number"),
            (r#"{"includes": {"minKernel": 4}}"#, "at syscalls[0].includes.minKernel, found 4"),
            (
                r#"{"includes": {"caps": "C"}}"#,
                "wanted a list of strings at syscalls[0].includes.caps, found a string",
            ),
            (
                r#"{"includes": {"cap": ["C"]}}"#,
                "wanted only keys that locum knows at syscalls[0].includes, found \"cap\"",
            ),
            (r#"{"includes": ["C"]}"#, "wanted an object at syscalls[0].includes, found a list"),
            (r#"{"Includes": {}}"#, "wanted only keys that locum knows at syscalls[0], found \"Includes\""),
            (
                r#"{"Names": ["open_by_handle_at"]}"#,
                "wanted only keys that locum knows at syscalls[0], found \"Names\"",
            ),
            (r#"{"names": "a"}"#, "wanted a list of strings at syscalls[0].names, found a string"),
            (r#"{"name": "a", "names": ["b"]}"#, "wanted either name or names at syscalls[0], found both"),
            (r#"{"args": {}}"#, "wanted a list of objects at syscalls[0].args, found an object"),
            (r#"{"errno": "ENOSYS"}"#, "wanted an errnoRet at syscalls[0], found only an errno"),
            (
                r#"{"action": "SCMP_ACT_NOTIFY"}"#,
                "wanted no other listener's calls at syscalls[0], found SCMP_ACT_NOTIFY",
            ),
        ] {
            let found = error(&format!(r#"{{"defaultAction": "A", "syscalls": [{rule}]}}"#));
            assert!(found.contains(wanted), "for {rule}: {found}");
        }
        assert!(error("{").contains("not JSON"));
    }
}
