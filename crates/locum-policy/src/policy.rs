//! A policy as the rest of locum sees it.

use crate::scope::{Scope, ScopeError, Subject};

/// A call that a policy can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// name_to_handle_at(2).
    NameToHandleAt,
    /// open_by_handle_at(2).
    OpenByHandleAt,
}

impl Call {
    /// All of them.
    pub const ALL: &'static [Self] = &[Self::NameToHandleAt, Self::OpenByHandleAt];

    /// As the kernel and seccomp profiles call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NameToHandleAt => "name_to_handle_at",
            Self::OpenByHandleAt => "open_by_handle_at",
        }
    }
}

/// How `O_PATH` descriptors are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OPath {
    /// As what they are, always.
    Exact,
    /// One that can be read stands in, for files and folders that the caller may read; all others are exact.
    Fast,
}

impl OPath {
    /// Its name in a policy file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// What one session may use at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Workers, over all listeners of the session.
    pub workers: u32,
    /// How long one call may take, in milliseconds.
    pub deadline_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { workers: 16, deadline_ms: 10_000 }
    }
}

/// What one kind of workload may have done for it, and with which limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name, by which a profile's `listenerMetadata` chooses it.
    pub name: String,
    /// The calls that are made for it.
    pub calls: Vec<Call>,
    /// The users whose container runtimes may choose it.
    pub peers: Vec<u32>,
    /// Paths in the workload; the mounts on which they lie are the exports.
    pub exports: Vec<String>,
    /// Within what a handle is good.
    pub scope: Scope,
    /// How `O_PATH` descriptors are handed over.
    pub o_path: OPath,
    /// Whether a copy of each listener is kept in the workload itself, for the case that all of locum is lost.
    pub lifeline: bool,
    /// What one session may use.
    pub limits: Limits,
}

impl Policy {
    /// Whether the runtime of user `uid` may choose this policy.
    pub fn permits_peer(&self, uid: u32) -> bool {
        self.peers.contains(&uid)
    }

    /// The scope of the handles of one workload.
    pub fn scope(&self, subject: &Subject<'_>) -> Result<String, ScopeError> {
        self.scope.of(&self.name, subject)
    }

    /// The policy as a file that [`crate::parse`] reads back.
    pub fn to_toml(&self) -> String {
        let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
        format!(
            "[{}]\ncalls = [{}]\npeers = [{}]\nexports = [{}]\nscope = {}\ntrusted = [{}]\no_path = {}\nlifeline = {}\n\n\
             [{}.limits]\nworkers = {}\ndeadline_ms = {}\n",
            quoted(&self.name),
            list(&mut self.calls.iter().map(|call| quoted(call.name()))),
            list(&mut self.peers.iter().map(u32::to_string)),
            list(&mut self.exports.iter().map(|path| quoted(path))),
            quoted(self.scope.template()),
            list(&mut self.scope.fields().map(|field| quoted(&field))),
            quoted(self.o_path.name()),
            self.lifeline,
            quoted(&self.name),
            self.limits.workers,
            self.limits.deadline_ms,
        )
    }
}

/// `text` as a TOML string.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// The policies that need no file.
pub fn builtin() -> Vec<Policy> {
    vec![Policy {
        name: "virtiofsd".to_owned(),
        calls: Call::ALL.to_vec(),
        peers: vec![0],
        exports: vec!["/share".to_owned()],
        scope: Scope::container(),
        o_path: OPath::Fast,
        lifeline: true,
        limits: Limits::default(),
    }]
}
