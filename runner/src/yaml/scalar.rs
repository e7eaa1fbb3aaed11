//! What a plain scalar means: YAML 1.2's core schema, and `0b` for binary numbers.

use serde_json::{Number, Value};

/// What a scalar without quotes means; `None` for the numbers that JSON does not have. What looks like a number and is
/// none that can be held (`010`, `1e400`) stays a text: where a number is wanted, its writer is told.
pub(super) fn plain(text: &str) -> Option<Value> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Some(Value::Null),
        "true" | "True" | "TRUE" => return Some(Value::Bool(true)),
        "false" | "False" | "FALSE" => return Some(Value::Bool(false)),
        _ => {}
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return None;
    }
    let number = integer(text.starts_with('-'), unsigned).or_else(|| real(text, unsigned));
    Some(number.map_or_else(|| Value::String(text.to_owned()), Value::Number))
}

fn integer(negative: bool, digits: &str) -> Option<Number> {
    let (digits, radix) = match digits.get(..2) {
        Some("0x") => (&digits[2..], 16),
        Some("0o") => (&digits[2..], 8),
        Some("0b") => (&digits[2..], 2),
        _ if digits.len() > 1 && digits.starts_with('0') => return None,
        _ => (digits, 10),
    };
    // `from_str_radix` would take a sign.
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    let size = u64::from_str_radix(digits, radix).ok()?;
    match negative {
        false => Some(size.into()),
        true => 0_i64.checked_sub_unsigned(size).map(Number::from),
    }
}

fn real(text: &str, unsigned: &str) -> Option<Number> {
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let exponent_fits = exponent.is_none_or(|exponent| {
        let size = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
        !size.is_empty() && digits(size)
    });
    if !digits(whole) || !digits(fraction) || whole.len() + fraction.len() == 0 || !exponent_fits {
        return None;
    }
    // Digits alone are a whole number that does not fit, or has zeros in front.
    if exponent.is_none() && !mantissa.contains('.') {
        return None;
    }
    Number::from_f64(text.parse().ok()?)
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
