//! JSON that others wrote, in which a name may come twice in an object: readers take the first or the last of them, each
//! as it likes, so such text is refused.
//!
//! In: bytes. Out: a value. Deliberately absent: limits of length, which whoever reads the file sets.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, Deserialize, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

/// Reads a value.
///
/// # Errors
/// The text is no JSON, an object has a name twice, or the value is not of this type.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice::<Unique>(text)?;
    serde_json::from_slice(text)
}

/// Any value in whose objects no name comes twice; nothing of it is kept.
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
