//! locum-journal
#![forbid(unsafe_code)]
