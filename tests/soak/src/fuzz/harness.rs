//! A target that breaks on demand, which shows that the harness detects it.

use super::Target;

/// Not among a soak's targets.
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

/// Recurses until the stack overflows.
#[allow(
    unconditional_recursion,
    reason = "a stack that overflows is what is tried"
)]
fn descend(depth: u64) -> u64 {
    std::hint::black_box(descend(std::hint::black_box(depth) + 1) + 1)
}
