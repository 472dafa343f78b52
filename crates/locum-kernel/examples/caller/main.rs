//! A caller for the kernel tests: makes the calls with exact raw arguments and prints a line of JSON for each case.
//!
//! `caller MODE SET DIR [ARG]…`: MODE is `own` (no rights at all), `decode` (the same user with CAP_DAC_READ_SEARCH) or
//! `as-is`; SET is `name`, `open` or an attack's name; DIR is the ground that the test prepared.

mod attack;
mod bare;
mod intact;
mod leave;
mod name;
mod open;
mod shed;
mod small;
mod state;

use bare::Ground;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, mode, set, dir, rest @ ..] = &args[..] else { panic!("caller MODE SET DIR [ARG]…") };
    if mode != "as-is" {
        bare::become_user(mode == "decode");
    }
    let ground = Ground::new(dir, mode == "own");
    match set.as_str() {
        "name" => name::run(&ground),
        "open" => open::run(&ground),
        "jail" => name::jail(&ground),
        "intact" => {
            let [seconds, signal_every] = rest else {
                panic!("caller MODE intact DIR SECONDS SIGNAL_EVERY_US")
            };
            intact::run(&ground, seconds.parse().unwrap(), signal_every.parse().unwrap());
        }
        "attached" => intact::while_attached(rest[0].parse().unwrap()),
        "surgeon" => intact::surgeon(&rest[0], &rest[1]),
        "small" => intact::on_a_small_stack(&ground),
        "leave" => leave::run(&ground),
        "shed" => shed::run(&ground, &rest[0], rest.get(1).map_or(0, |failed| failed.parse().unwrap())),
        "state" => state::run(Box::leak(Box::new(ground)), &rest[0]),
        "permission" => open::permissions_of(&ground),
        attack => attack::run(attack, &ground, rest),
    }
}
