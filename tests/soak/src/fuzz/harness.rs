//! A target that breaks as it is told: shows that the harness notices.

use super::Target;

/// Not among the targets that a soak feeds.
pub const HARNESS: Target = Target {
    name: "harness",
    exercise,
    tokens: &[],
    mend: None,
    examples: None,
};

fn exercise(bytes: &[u8]) -> String {
    match bytes {
        b"panic" => panic!("as told"),
        b"spin" => loop {
            std::hint::spin_loop();
        },
        b"greed" => {
            let much = vec![1_u8; 1 << 30];
            format!("{}", std::hint::black_box(much).len())
        }
        b"depth" => format!("{}", descend(bytes.len() as u64)),
        _ => String::new(),
    }
}

/// Never ends but by a full stack.
#[allow(
    unconditional_recursion,
    reason = "a stack that overflows is what is tried"
)]
fn descend(depth: u64) -> u64 {
    std::hint::black_box(descend(std::hint::black_box(depth) + 1) + 1)
}
