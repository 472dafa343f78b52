//! locum-policy
#![forbid(unsafe_code)]
