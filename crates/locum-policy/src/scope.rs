//! Within what a handle is good: a template, filled in for each session.

use std::collections::BTreeMap;

/// What a template is filled in with.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// The rootless user at whose door the workload was delivered; `None` at root's. Always part of the scope.
    pub peer_uid: Option<u32>,
    /// The container's id, as its runtime gave it.
    pub container: &'a str,
    /// Its annotations.
    pub annotations: &'a BTreeMap<String, String>,
}

/// Why a scope cannot be made for a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// The workload lacks what the template asks for.
    #[error("the policy's scope wants the annotation {0:?}, which this container does not have")]
    NoAnnotation(String),
}

/// A template such as `{container}` or `{annotation:org.example/vm}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    template: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Container,
    Policy,
    Annotation(String),
}

impl Part {
    fn field(&self) -> Option<String> {
        match self {
            Self::Text(_) => None,
            Self::Container => Some("container".to_owned()),
            Self::Policy => Some("policy".to_owned()),
            Self::Annotation(name) => Some(format!("annotation:{name}")),
        }
    }
}

impl Scope {
    /// Reads a template. The error says what is wrong with it.
    pub(crate) fn parse(template: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = template;
        while !rest.is_empty() {
            let end = rest.find(['{', '}']).unwrap_or(rest.len());
            if end > 0 {
                parts.push(Part::Text(rest[..end].to_owned()));
            }
            let Some(field) = rest[end..].strip_prefix('{') else {
                if rest[end..].is_empty() {
                    break;
                }
                return Err("a } without its {".to_owned());
            };
            let (name, after) = field.split_once('}').ok_or("a { without its }")?;
            parts.push(match name.strip_prefix("annotation:") {
                Some("") => return Err("{annotation:} without a name".to_owned()),
                Some(annotation) => Part::Annotation(annotation.to_owned()),
                None if name == "container" => Part::Container,
                None if name == "policy" => Part::Policy,
                None => {
                    return Err(format!(
                        "unknown field {{{name}}}: wanted {{container}}, {{policy}} or {{annotation:NAME}}"
                    ));
                }
            });
            rest = after;
        }
        if parts.is_empty() {
            return Err("an empty template: every session would have the same scope".to_owned());
        }
        Ok(Self { template: template.to_owned(), parts })
    }

    pub(crate) fn container() -> Self {
        Self { template: "{container}".to_owned(), parts: vec![Part::Container] }
    }

    /// As it was written.
    pub fn template(&self) -> &str {
        &self.template
    }

    /// The fields that it uses, as `trusted` names them.
    pub(crate) fn fields(&self) -> impl Iterator<Item = String> + '_ {
        self.parts.iter().filter_map(Part::field)
    }

    /// Filled in. Every value is preceded by its length, so that no two different fillings are the same text.
    pub(crate) fn of(&self, policy: &str, subject: &Subject<'_>) -> Result<String, ScopeError> {
        let value = |part: &Part| match part {
            Part::Text(text) => Ok(text.clone()),
            Part::Container => Ok(counted(subject.container)),
            Part::Policy => Ok(counted(policy)),
            Part::Annotation(name) => {
                let annotation = subject.annotations.get(name);
                annotation.map(|value| counted(value)).ok_or_else(|| ScopeError::NoAnnotation(name.clone()))
            }
        };
        let filled = self.parts.iter().map(value).collect::<Result<String, _>>()?;
        let owner = subject.peer_uid.map_or_else(|| "root".to_owned(), |uid| format!("uid {uid}"));
        Ok(format!("{owner}; {filled}"))
    }
}

fn counted(value: &str) -> String {
    format!("{}:{value}", value.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(template: &str, uid: Option<u32>, container: &str, annotation: &str) -> Result<String, ScopeError> {
        let annotations = BTreeMap::from([("vm".to_owned(), annotation.to_owned())]);
        Scope::parse(template)
            .unwrap()
            .of("p", &Subject { peer_uid: uid, container, annotations: &annotations })
    }

    #[test]
    fn different_subjects_never_have_the_same_scope() {
        let two = "{container}{annotation:vm}";
        assert_ne!(of(two, None, "a", "bc"), of(two, None, "ab", "c"));
        assert_ne!(of("{container}", None, "a", ""), of("{container}", Some(0), "a", ""));
        assert_ne!(of("{container}", Some(1), "a", ""), of("{container}", Some(11), "a", ""));
        assert_ne!(of("{container}", Some(1), "1; 1:a", ""), of("{container}", Some(11), "a", ""));
    }

    #[test]
    fn an_annotation_that_is_missing_is_an_error() {
        assert_eq!(of("{annotation:other}", None, "a", ""), Err(ScopeError::NoAnnotation("other".into())));
    }
}
