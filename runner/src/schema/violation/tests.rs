//! Messages about values that a schema refuses.

use serde_json::json;

use super::*;
use crate::plan::fake;

fn check_value(value: Value, expected: &[(&str, &str)]) {
    let schema = fake::schema("everything");
    let found: Vec<(String, String)> = check(&schema, &value, "option")
        .into_iter()
        .map(|violation| {
            (
                violation.pointer,
                format!(
                    "{} / {}",
                    violation.message,
                    violation.hint.unwrap_or_default()
                ),
            )
        })
        .collect();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (pointer, part) in expected {
        assert!(
            found
                .iter()
                .any(|(at, said)| at == pointer && said.contains(part)),
            "{found:#?}\nlacks {pointer} {part}"
        );
    }
}

#[test]
fn mistakes_are_said_in_words() {
    check_value(json!({"data": "d"}), &[]);
    check_value(
        json!({}),
        &[("", "the option `data` is missing / `data`: The images.")],
    );
    // Misspelt and therefore missing: one mistake.
    check_value(
        json!({"dta": "d"}),
        &[("/dta", "unknown option `dta` / did you mean `data`?")],
    );
}

/// Checks options of which one is wrong.
fn with(key: &str, value: Value, expected: &[(&str, &str)]) {
    let mut options = json!({"data": "d"});
    options[key] = value;
    check_value(options, expected);
}

#[test]
fn numbers_flags_and_texts_are_said_in_words() {
    with(
        "steps",
        json!("1_000"),
        &[("/steps", "without separators: 1000")],
    );
    for (text, hint) in [
        (
            "010",
            "write 10; where the octal number is meant, write 0o10 or 8",
        ),
        ("-010", "write -10;"),
        ("09", "write 9"),
        ("1e400", "too large: numbers go up to"),
        (
            "99999999999999999999",
            "too large: whole numbers go up to 9007199254740992",
        ),
        ("\u{a0}16", "write 16: U+00A0"),
        ("16", "remove the quotes: 16"),
        ("1 000", "without separators: 1000"),
    ] {
        with("steps", json!(text), &[("/steps", hint)]);
    }
    with(
        "steps",
        json!(1.5),
        &[("/steps", "expected a whole number, got 1.5")],
    );
    with(
        "steps",
        json!(0),
        &[("/steps", "`steps` is 0; at least 1 was expected")],
    );
    with(
        "flag",
        json!("yes"),
        &[("/flag", "write `true` or `false`")],
    );
    with("data", json!(5), &[("/data", "put it in quotes: \"5\"")]);
    with("times", json!(3), &[("/times", "write a list: [3]")]);
    with(
        "times",
        json!([1, "x"]),
        &[("/times/1", "expected a whole number")],
    );
}

#[test]
fn mistakes_in_choices_are_said_in_words() {
    // Option<f64>: null is not offered.
    with(
        "guidance",
        json!("x"),
        &[(
            "/guidance",
            "`guidance`: expected a number, got the text \"x\"",
        )],
    );
    // An enum with described variants.
    with(
        "loss",
        json!("l3"),
        &[(
            "/loss",
            "expected one of `l1`, `l2`, got \"l3\" / did you mean",
        )],
    );
    // A tagged enum, optional.
    with(
        "schedule",
        json!({"type": "cosine", "wramup": 3}),
        &[(
            "/schedule/wramup",
            "unknown key `wramup` in `schedule` / did you mean `warmup`?",
        )],
    );
    with(
        "schedule",
        json!({"type": "constant", "rate": "x"}),
        &[("/schedule/rate", "expected a number")],
    );
    with(
        "schedule",
        json!({"type": "linear"}),
        &[("/schedule/type", "expected one of `constant`, `cosine`")],
    );
    with(
        "schedule",
        json!({"warmup": 1}),
        &[("/schedule", "the key `type` is missing")],
    );
    with(
        "schedule",
        json!(3),
        &[("/schedule", "expected a mapping, got 3")],
    );
}
