//! The meaning of plain scalars: YAML 1.2's core schema, and `0b` for binary numbers, as in serde_yaml.

use serde_json::{Number, Value};

/// The value of an unquoted scalar; `None` for numbers that JSON does not have. A text that looks like a number but cannot be
/// represented (`010`, `1e400`) stays a text, so that it is reported wherever a number is expected.
pub(super) fn plain(text: &str) -> Option<Value> {
    let said = Value::String(text.to_owned());
    let value = match text {
        "" => return Some(Value::Null),
        // Most numbers in a long list; serde_yaml would take a while for them.
        text if is_short_number(text) => return text.parse().ok().map(Value::Number),
        text if may_be_no_text(text) => serde_yaml::from_str(text),
        _ => return Some(said),
    };
    Some(match value {
        Ok(serde_yaml::Value::Null) => Value::Null,
        Ok(serde_yaml::Value::Bool(value)) => value.into(),
        Ok(serde_yaml::Value::Number(number)) => Value::Number(number_of(&number)?),
        // For example an integer that is too large.
        _ => said,
    })
}

/// Only a few digits.
fn is_short_number(text: &str) -> bool {
    let few = (1..=18).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    few && (text == "0" || !text.starts_with('0'))
}

/// Whether serde_yaml has to decide. Text that starts or ends like document markup is never read as markup.
fn may_be_no_text(text: &str) -> bool {
    let is_word = text == "~"
        || (4..=5).contains(&text.len())
            && text.starts_with(['n', 'N', 't', 'T', 'f', 'F', '.', '+', '-']);
    let is_number = text.contains(|c: char| c.is_ascii_digit());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '~');
    (is_word || is_number) && text.chars().all(plain) && text != "..."
}

fn number_of(number: &serde_yaml::Number) -> Option<Number> {
    if let Some(number) = number.as_u64() {
        return Some(number.into());
    }
    match number.as_i64() {
        Some(number) => Some(number.into()),
        None => Number::from_f64(number.as_f64()?),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_mean_what_the_core_schema_says() {
        let check = |text: &str, expected: Value| {
            assert_eq!(plain(text), Some(expected), "{text}");
        };
        check("~", Value::Null);
        check("True", json!(true));
        check("12", json!(12));
        check("-12", json!(-12));
        check("+12", json!(12));
        check("0", json!(0));
        check("-0", json!(0));
        check("0x1F", json!(31));
        check("-0x10", json!(-16));
        check("0o17", json!(15));
        check("0b11", json!(3));
        check("18446744073709551615", json!(u64::MAX));
        check("-9223372036854775808", json!(i64::MIN));
        check("1e3", json!(1000.0));
        check(".5", json!(0.5));
        check("5.", json!(5.0));
        check("-1.5E-3", json!(-0.0015));
        for text in [
            "yes",
            "010",
            "1e400",
            "18446744073709551616",
            "-9223372036854775809",
            "1_000",
            "0x",
            "0x-1",
            "--1",
            "+-1",
            "e3",
            ".",
            "1e",
            "1e+",
            "inf",
            "nan",
            "infinity",
            "1.2.3",
            "0o8",
            "2020-01-01",
            "1:30",
            "-",
            "é",
            "-.nan",
        ] {
            check(text, json!(text));
        }
        for text in [".inf", "-.INF", "+.inf", ".nan"] {
            assert_eq!(plain(text), None, "{text}");
        }
    }
}
