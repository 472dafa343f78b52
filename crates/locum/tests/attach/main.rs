//! `locum attach` and what puts lost listeners back, on programs that run: each goes on to its own checked result.

#[path = "../common/mod.rs"]
mod common;
mod go;
mod killed;
mod lost;
mod refused;
mod states;
mod whose;
mod yard;
