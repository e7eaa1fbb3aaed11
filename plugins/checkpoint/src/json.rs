//! JSON from others. An object may have duplicate names, of which some readers take the first, some the last; and a text may be
//! a hundred times as large in memory. Both are refused, the second before any value is built.
//!
//! In: bytes. Out: a value. Deliberately absent: limits of length, which the caller sets when it reads the file.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, Deserialize, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

/// The most memory that a value may take, as estimated by [`weight`].
pub const HEAVIEST: usize = 256 << 20;

/// The most that a byte of text can weigh.
const HEAVIEST_BYTE: usize = 640;

/// Reads a value.
///
/// # Errors
/// The text is not JSON, would take more than [`HEAVIEST`] in memory, an object has a name twice, or the value is not of this
/// type.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    parse_within(text, HEAVIEST)
}

/// The same, with a limit on memory.
///
/// # Errors
/// The same.
pub fn parse_within<T: DeserializeOwned>(text: &[u8], most: usize) -> serde_json::Result<T> {
    check_weight(text, most)?;
    serde_json::from_slice::<Unique>(text)?;
    serde_json::from_slice(text)
}

/// Refuses text that would take more memory.
///
/// # Errors
/// It would.
pub fn check_weight(text: &[u8], most: usize) -> serde_json::Result<()> {
    match text.len() > most / HEAVIEST_BYTE && weight(text) > most {
        true => Err(de::Error::custom(format!(
            "so many values that they would take more than {} MiB of memory, the most that is read",
            most >> 20
        ))),
        false => Ok(()),
    }
}

/// A rough estimate of a text's size in memory, from above: a digit becomes a value in a list with capacity for twice as many,
/// a list begins with room for four, a text has its own allocation, an object with one entry has room for four and a table.
pub fn weight(text: &[u8]) -> usize {
    const VALUE: usize = size_of::<serde_json::Value>();
    let (mut weight, mut quoted, mut escaped) = (text.len(), false, false);
    for &byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => {
                quoted = !quoted;
                weight += 16;
            }
            _ if quoted => {}
            b',' => weight += 2 * VALUE,
            b':' => weight += 64,
            b'[' => weight += 4 * VALUE + 16,
            b'{' => weight += HEAVIEST_BYTE - 1,
            _ => {}
        }
    }
    weight
}

/// Any value without duplicate names in its objects; its content is discarded.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Unique, A::Error> {
        while list.next_element::<Unique>()?.is_some() {}
        Ok(Unique)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
        const SHOWN: usize = 80;
        const MOST: usize = 1 << 20;
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if names.contains(&name) {
                let shown: String = name.chars().take(SHOWN).collect();
                let more = if shown.len() < name.len() { "..." } else { "" };
                let message = format!("{shown:?}{more} comes twice in an object; keep one");
                return Err(de::Error::custom(message));
            }
            names.insert(name);
            if names.len() > MOST {
                let message = format!("more than {MOST} names in an object, the most that is read");
                return Err(de::Error::custom(message));
            }
            map.next_value::<Unique>()?;
        }
        Ok(Unique)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_name_that_comes_twice_is_refused_wherever_it_is() {
        for text in [
            r#"{"a": 1, "a": 1}"#,
            r#"{"b": [0, {"a": null, "x": {}, "a": 2}]}"#,
            r#"{"a": 1, "\u0061": 2}"#,
        ] {
            let error = parse::<Value>(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(r#""a" comes twice"#), "{error}");
            assert!(error.contains("line 1 column"), "{error}");
        }
        let text = r#"{"a": {"a": [1, -1, 1.5, true, null, "s"]}, "A": 1e300}"#;
        let expected = json!({"a": {"a": [1, -1, 1.5, true, null, "s"]}, "A": 1e300});
        assert_eq!(parse::<Value>(text.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn text_that_is_large_in_memory_is_refused() {
        for one in ["[0],", "[],", "{\"\":0},", "0,", "\"\",", "[{}],"] {
            let text = format!("[{}0]", one.repeat((24 << 20) / one.len()));
            let error = parse::<Value>(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("more than 256 MiB"), "{one}: {error}");
            let few = format!("[{}0]", one.repeat(1000));
            assert!(parse::<Value>(few.as_bytes()).is_ok(), "{one}");
            let error = parse_within::<Value>(few.as_bytes(), 1 << 10).unwrap_err();
            assert!(error.to_string().contains("more than 0 MiB"), "{error}");
        }
        // As long, but one text, in which brackets count as little as other letters.
        let text = serde_json::to_string(&"[{,:\\\"".repeat(4 << 20)).unwrap();
        assert!(parse::<String>(text.as_bytes()).is_ok());
    }

    #[test]
    fn a_value_is_no_larger_than_its_weight() {
        fn size(value: &Value) -> usize {
            const ONE: usize = size_of::<Value>();
            match value {
                Value::Array(list) => {
                    16 + list.capacity() * ONE + list.iter().map(size).sum::<usize>()
                }
                Value::Object(map) => {
                    // An entry with its hash, and a place in a table; both may be twice as many.
                    let room = 4.max(map.len().next_power_of_two());
                    let names = map.keys().map(|name| 16 + name.len()).sum::<usize>();
                    96 + room * (ONE + 32 + 10) + names + map.values().map(size).sum::<usize>()
                }
                Value::String(text) => 16 + text.len(),
                _ => 0,
            }
        }
        for one in [
            "[0],",
            "[[]],",
            "{\"a\":0},",
            "\"ab\",",
            "1,",
            "{\"a\":1,\"b\":[2],\"c\":3,\"d\":{\"e\":5},\"f\":6},",
        ] {
            let text = format!("[{}0]", one.repeat(1000));
            let value: Value = serde_json::from_str(&text).unwrap();
            let (size, weight) = (size(&value), weight(text.as_bytes()));
            assert!(
                size <= weight && weight <= 4 * size,
                "{one}: {size}, estimated as {weight}"
            );
        }
    }

    #[test]
    fn what_is_no_json_is_said_as_ever_and_nothing_is_long_or_deep() {
        let said = |text: &str| parse::<Value>(text.as_bytes()).unwrap_err().to_string();
        assert!(said("nonsense").contains("line 1 column 2"));
        assert!(said(&"[".repeat(100_000)).contains("recursion limit"));
        let name = "n".repeat(1 << 16);
        assert!(said(&format!(r#"{{"{name}": 1, "{name}": 2}}"#)).len() < 300);
        assert!(
            parse::<u32>(b"\"text\"")
                .unwrap_err()
                .to_string()
                .contains("u32")
        );
    }
}
