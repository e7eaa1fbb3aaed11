//! What a plain scalar means: YAML 1.2's core schema, and `0b` for binary numbers, as serde_yaml has them.

use serde_json::{Number, Value};

/// What a scalar without quotes means; `None` for the numbers that JSON does not have. What looks like a number and is
/// none that can be held (`010`, `1e400`) stays a text: where a number is wanted, its writer is told.
pub(super) fn plain(text: &str) -> Option<Value> {
    let said = Value::String(text.to_owned());
    let value = match text {
        "" => return Some(Value::Null),
        text if may_be_no_text(text) => serde_yaml::from_str(text),
        _ => return Some(said),
    };
    Some(match value {
        Ok(serde_yaml::Value::Null) => Value::Null,
        Ok(serde_yaml::Value::Bool(value)) => value.into(),
        Ok(serde_yaml::Value::Number(number)) => Value::Number(number_of(&number)?),
        // A whole number that is too large, for one.
        _ => said,
    })
}

/// Whether serde_yaml has to be asked. What begins or ends as markup of a document is never read as such.
fn may_be_no_text(text: &str) -> bool {
    let is_word = text == "~" || (4..=5).contains(&text.len());
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
