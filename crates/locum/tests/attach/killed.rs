//! The surgeon is killed.
#![cfg(debug_assertions)]

use crate::yard::{Yard, must_be_right};

#[test]
fn attaching_is_killed_at_every_step() {
    let yard = Yard::new();
    let rounds = std::env::var("LOCUM_CHAOS_SECONDS").map_or(20, |text| text.parse().unwrap());
    for round in 0..rounds {
        let kind = ["reckon", "sleep", "fork"][round % 3];
        for step in 21..=26 {
            let busy = yard.start(kind);
            let mut killed = yard.command("attach", &busy, &["--policy", "attached"]);
            let out = killed.env("LOCUM_DIE_AT", step.to_string()).output().unwrap();
            assert!(out.status.code().is_none(), "step {step}: {}", String::from_utf8_lossy(&out.stdout));
            let (good, told) = yard.attach(&busy);
            assert!(good, "after step {step}, {kind}: {told}");
            yard.await_calls();
            must_be_right(busy);
        }
    }
}
