//! What a caller that means harm does.

use crate::bare::Ground;

pub(crate) fn run(attack: &str, _ground: &Ground, _args: &[String]) {
    panic!("no attack {attack}");
}
