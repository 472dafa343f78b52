//! Listeners that are lost, and put back.

use crate::common::until;
use crate::yard::{Yard, must_be_right};

#[test]
fn a_lost_listener_is_put_back_again_and_again() {
    let mut yard = Yard::new();
    let busy = yard.start("reckon");
    let (good, told) = yard.attach(&busy);
    assert!(good, "{told}");
    yard.await_calls();
    for _ in 0..50 {
        yard.keeper.kill();
        yard.monitor.kill();
        (yard.keeper, yard.monitor) = (yard.ground.keeper(), Yard::monitor(&yard.ground));
        until("a session", || !yard.ground.status()["sessions"].as_array().unwrap().is_empty());
        yard.await_calls();
    }
    let told = must_be_right(busy);
    assert!(told["served"].as_u64() > Some(0), "{told}");
}
