//! locum-keeper
#![forbid(unsafe_code)]
