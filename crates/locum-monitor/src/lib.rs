//! locum-monitor
#![forbid(unsafe_code)]
