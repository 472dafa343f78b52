//! How the tests set themselves up and run.

fn main() {}
