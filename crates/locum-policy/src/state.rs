//! What a container runtime says of a workload: the OCI `ContainerProcessState`, and the profile's `listenerMetadata`.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::Deserialize;

use crate::file::is_name;

/// Why a runtime's message is no state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not JSON, or not of that form.
    #[error("wanted an OCI ContainerProcessState, found: {0}")]
    Form(#[from] serde_json::Error),
    /// Without it there is no session.
    #[error("wanted a container's id in state.id, found none")]
    NoId,
}

/// A workload as its runtime describes it, as far as locum reads it. What is not known is passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The container's id.
    pub container: String,
    /// `creating`, `created`, `running`, `stopped`.
    pub status: String,
    /// The profile's `listenerMetadata`.
    pub metadata: Option<String>,
    /// The container's annotations.
    pub annotations: BTreeMap<String, String>,
    /// What each descriptor of the message is, in their order.
    pub fds: Vec<String>,
    pid: u32,
    process: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProcessState {
    #[serde(default)]
    fds: Vec<String>,
    #[serde(default)]
    pid: i64,
    metadata: Option<String>,
    state: ContainerState,
}

#[derive(Deserialize)]
struct ContainerState {
    #[serde(default)]
    id: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    pid: i64,
    annotations: Option<BTreeMap<String, String>>,
}

impl State {
    /// Reads a runtime's message.
    pub fn parse(text: &str) -> Result<Self, StateError> {
        let parsed: ProcessState = serde_json::from_str(text)?;
        if parsed.state.id.is_empty() {
            return Err(StateError::NoId);
        }
        let pid = |pid: i64| u32::try_from(pid).unwrap_or(0);
        Ok(Self {
            container: parsed.state.id,
            status: parsed.state.status,
            metadata: parsed.metadata,
            annotations: parsed.state.annotations.unwrap_or_default(),
            fds: parsed.fds,
            pid: pid(parsed.state.pid),
            process: pid(parsed.pid),
        })
    }

    /// The container's first process; `None` if the runtime does not say (crun's exec says 0).
    pub fn first_process(&self) -> Option<u32> {
        [self.pid, self.process].into_iter().find(|pid| *pid != 0)
    }

    /// The process with which the listener's filter began: what is `exec`uted in a container has one of its own. `None` if the
    /// runtime does not say.
    pub fn own_process(&self) -> Option<u32> {
        Some(self.process).filter(|pid| *pid != 0)
    }
}

/// What a profile's `listenerMetadata` says: `policy=NAME`, and `key=ID` where a migrated workload's key is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// The policy's name.
    pub policy: String,
    /// The id of the key that signs.
    pub key: Option<String>,
}

/// Why a text is no metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted policy=NAME or policy=NAME,key=ID, found {0:?}")]
pub struct MetadataError(String);

impl FromStr for Metadata {
    type Err = MetadataError;

    fn from_str(text: &str) -> Result<Self, MetadataError> {
        let wrong = || MetadataError(text.chars().take(200).collect());
        let (mut policy, mut key) = (None, None);
        for field in text.split(',') {
            let (name, value) = field.trim().split_once('=').ok_or_else(wrong)?;
            let place = match name {
                "policy" if is_name(value) => &mut policy,
                "key"
                    if value.len() == 8 && value.bytes().all(|byte| b"0123456789abcdef".contains(&byte)) =>
                {
                    &mut key
                }
                _ => return Err(wrong()),
            };
            if place.replace(value.to_owned()).is_some() {
                return Err(wrong());
            }
        }
        Ok(Self { policy: policy.ok_or_else(wrong)?, key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runtimes_are_understood() {
        let crun = "{ \"ociVersion\": \"0.2.0\", \"fds\": [ \"seccompFd\" ], \"pid\": 4664, \"metadata\": \"m\",\n \
                    \"state\": { \"ociVersion\": \"0.2.0\", \"id\": \"c1\", \"status\": \"creating\", \"pid\": 4664, \"bundle\": \"/b\" } }\n";
        let state = State::parse(crun).unwrap();
        assert_eq!((state.container.as_str(), state.first_process()), ("c1", Some(4664)));
        assert_eq!(state.own_process(), Some(4664));
        let runc_exec = r#"{"ociVersion":"1.0.2-dev","fds":["seccompFd"],"pid":9,"metadata":"m","state":{"ociVersion":"1.0.2-dev","id":"c1","status":"running","pid":7,"bundle":"/b","annotations":{"a":"b"}}}"#;
        let state = State::parse(runc_exec).unwrap();
        assert_eq!((state.first_process(), state.annotations["a"].as_str()), (Some(7), "b"));
        assert_eq!(state.own_process(), Some(9));
        let crun_exec =
            r#"{"fds":["seccompFd"],"pid":0,"state":{"id":"c1","status":"running","pid":0,"bundle":"."}}"#;
        let state = State::parse(crun_exec).unwrap();
        assert_eq!((state.first_process(), state.own_process(), state.metadata), (None, None, None));
    }

    #[test]
    fn what_is_no_state_is_an_error() {
        for text in [
            "",
            "{}",
            "[]",
            "{\"state\":{}}",
            "{\"state\":{\"id\":7}}",
            "{\"state\":{\"id\":\"x\",\"pid\":\"1\"}}",
        ] {
            assert!(State::parse(text).is_err(), "{text}");
        }
        let odd = State::parse(r#"{"pid":-5,"state":{"id":"../x","pid":99999999999}}"#).unwrap();
        assert_eq!(odd.first_process(), None);
    }

    #[test]
    fn metadata_names_one_policy_and_at_most_one_key() {
        let parse = |text: &str| text.parse::<Metadata>();
        assert_eq!(parse("policy=a").unwrap(), Metadata { policy: "a".into(), key: None });
        assert_eq!(parse("policy=a, key=00ff00ff").unwrap().key.as_deref(), Some("00ff00ff"));
        for wrong in [
            "",
            "a",
            "policy=",
            "policy=../a",
            "policy=a,policy=b",
            "key=00ff00ff",
            "policy=a,key=1",
            "policy=a,x=y",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
