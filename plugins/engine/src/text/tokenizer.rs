//! `tokenizer.json`, checked before it is used: the library that reads it trusts it.
//!
//! In: the file. Out: a tokenizer that takes bounded time and memory. A few kilobytes of replacements, each of which doubles a
//! text, would take forever. So the growth that all steps together allow is limited, and a text is cut so that its result has
//! a limited length. The library takes hundreds of bytes for each different prefix of a token; their number is limited too.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use retort_checkpoint::{json, regular};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::{Tokenizer, TruncationParams};

use crate::error::{Error, Result};

/// The most bytes of the file; a quarter of a million tokens take some 20 MB.
const LONGEST_FILE: u64 = 64 << 20;
/// The most memory of its values; a quarter of a million tokens take some 160 MB.
const HEAVIEST: usize = 192 << 20;
/// The most steps of a normalizer, a pre-tokenizer or a post-processor.
const MOST_STEPS: usize = 64;
/// The largest factor by which a text may grow.
const MOST_GROWTH: usize = 1024;
/// The most bytes to which a text may grow. Even at the largest factor two kilobytes of it are used, and models see only the
/// first hundred words.
const LONGEST_TEXT: usize = 2 << 20;
/// The most bytes of all added tokens, after their largest growth.
const LONGEST_ADDED: usize = 16 << 20;
/// The largest factor by which post-processing may increase the number of tokens.
const MOST_COPIES: usize = 64;
/// Bytes of the longest token, and the most tokens that are prefixes of one: the time for each place of a text grows with both.
const LONGEST_TOKEN: usize = 256;
const MOST_NESTED: usize = 64;
/// The most different prefixes of tokens, counted by bytes; the library takes some 350 bytes for each.
const MOST_BEGINNINGS: usize = 1 << 20;
/// The most characters of a word that is compared with all tokens, from each of its places.
const LONGEST_WORD: u64 = 1000;

/// A tokenizer that takes bounded time and memory for a text.
pub struct BoundedTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
    /// The largest factor by which a text can grow.
    growth: usize,
}

impl BoundedTokenizer {
    /// Reads and checks a file.
    pub fn open(path: &Path) -> Result<Self> {
        let text = regular::read(path, LONGEST_FILE).map_err(Error::io(path))?;
        let growth = growth_of_file(&text).map_err(|message| Error::data(path, message))?;
        let tokenizer = survived(|| Tokenizer::from_bytes(&text));
        let mut tokenizer = tokenizer.map_err(|message| Error::data(path, message))?;
        tokenizer.with_padding(None);
        Ok(Self {
            path: path.to_owned(),
            tokenizer,
            growth,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Token ids of a text, at most `most` before the post-processor adds its own.
    pub fn ids(&mut self, text: &str, most: usize) -> Result<Vec<u32>> {
        let cut = TruncationParams {
            max_length: most,
            ..Default::default()
        };
        let end = text.floor_char_boundary(LONGEST_TEXT / self.growth);
        let encoding = survived(|| {
            self.tokenizer.with_truncation(Some(cut))?;
            self.tokenizer.encode(&text[..end], true)
        });
        match encoding {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(message) => Err(Error::data(&self.path, message)),
        }
    }
}

/// The library's result; it panics on content that it does not expect.
fn survived<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("damaged in a way that its reader does not expect".to_owned()),
    }
}

/// The parts of the file that decide what a text costs.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    content: String,
}

#[derive(Default, Deserialize)]
struct Model {
    #[serde(default)]
    vocab: Vocabulary,
    #[serde(default)]
    max_input_chars_per_word: u64,
}

/// The tokens of a list (unigrams), which the library keeps in a tree; those of an object are a table.
#[derive(Default)]
struct Vocabulary(Vec<String>);

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;

        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocabulary;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tokens, each with its score or number")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocabulary, A::Error> {
                let mut tokens = Vec::new();
                while let Some((token, _)) = list.next_element::<(String, f64)>()? {
                    tokens.push(token);
                }
                Ok(Vocabulary(tokens))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Vocabulary::default())
            }
        }

        deserializer.deserialize_any(Tokens)
    }
}

/// Checks a file; returns the largest factor by which a text can grow.
fn growth_of_file(text: &[u8]) -> Result<usize, String> {
    let document: Document =
        json::parse_within(text, HEAVIEST).map_err(|error| error.to_string())?;
    let mut growth = 1_usize;
    for (name, part) in [
        ("normalizer", &document.normalizer),
        ("pre_tokenizer", &document.pre_tokenizer),
    ] {
        for step in steps(name, part)? {
            let own = growth_of(step).map_err(|message| format!("its {name}: {message}"))?;
            growth = growth.saturating_mul(own);
        }
    }
    if growth > MOST_GROWTH {
        return Err(format!(
            "its normalizer and pre_tokenizer could make a text {growth} times as long, expected at most {MOST_GROWTH}: take \
             the file that was published with the encoder"
        ));
    }
    let copies = steps("post_processor", &document.post_processor)?
        .into_iter()
        .fold(1, |copies: usize, step| {
            copies.saturating_mul(copies_of(step))
        });
    if copies > MOST_COPIES {
        return Err(format!(
            "its post_processor could make {copies} tokens of one, expected at most {MOST_COPIES}: take the file that was \
             published with the encoder"
        ));
    }
    let added = document.added_tokens.iter();
    let added: usize = added.map(|token| token.content.len()).sum();
    if added.saturating_mul(growth) > LONGEST_ADDED {
        return Err(format!(
            "its added_tokens have {added} bytes that could become {growth} times as long, expected at most {LONGEST_ADDED} \
             in all"
        ));
    }
    if document.model.max_input_chars_per_word > LONGEST_WORD {
        return Err(format!(
            "its max_input_chars_per_word is {}, expected at most {LONGEST_WORD}",
            document.model.max_input_chars_per_word
        ));
    }
    check_tokens(document.model.vocab.0)?;
    Ok(growth)
}

/// A part's steps, those in nested lists too. The lists themselves count, because one may also be a step of another kind.
fn steps<'v>(name: &str, part: &'v Value) -> Result<Vec<&'v Value>, String> {
    let (mut steps, mut ahead) = (Vec::new(), vec![part]);
    while let Some(step) = ahead.pop() {
        if step.is_null() {
            continue;
        }
        steps.push(step);
        if steps.len() > MOST_STEPS {
            return Err(format!("its {name} has more than {MOST_STEPS} steps"));
        }
        let inner = ["normalizers", "pretokenizers", "processors"];
        let lists = inner.iter().filter_map(|list| step.get(list)?.as_array());
        ahead.extend(lists.flatten().take(MOST_STEPS + 1));
    }
    Ok(steps)
}

/// The largest factor by which a step of a normalizer or pre-tokenizer can lengthen a text, in bytes.
fn growth_of(step: &Value) -> Result<usize, String> {
    let text = |name: &str| step.get(name).and_then(Value::as_str);
    let mut growth = match text("type") {
        Some("Lowercase") => 2,
        Some("NFC" | "NFD") => 3,
        // With a space before and after, and accents apart.
        Some("BertNormalizer") => 4,
        // A byte becomes a letter of two, with one for the space before.
        Some("ByteLevel") => 4,
        // U+FDFA, of three bytes, becomes four words.
        Some("NFKC" | "NFKD") => 12,
        // A space becomes a letter, and one is put before each word.
        Some("Metaspace") => 1 + text("replacement").map_or(4, str::len),
        Some(_) => 1,
        // Any of these: earlier versions wrote no types.
        None => 12,
    };
    if let Some(content) = text("content") {
        let pattern = &step["pattern"]["String"];
        growth = growth.saturating_mul(match pattern.as_str().unwrap_or_default().len() {
            // An expression may match nothing, at each place.
            0 => 1 + content.len(),
            least => content.len().div_ceil(least).max(1),
        });
    }
    if let Some(prefix) = text("prepend") {
        growth = growth.saturating_mul(1 + prefix.len());
    }
    if let Some(map) = text("precompiled_charsmap") {
        let longest = longest_replacement(map)
            .ok_or("its precompiled_charsmap is damaged, expected the base64 of SentencePiece's")?;
        growth = growth.saturating_mul(longest);
    }
    Ok(growth)
}

/// Bytes of the longest text by which SentencePiece's map replaces a letter: the length of a tree, the tree, and texts that end
/// with 0.
fn longest_replacement(map: &str) -> Option<usize> {
    let bytes = STANDARD.decode(map).ok()?;
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    // The tree consists of words of four bytes.
    let tree = u32::from_le_bytes(*length) as usize / 4 * 4;
    let texts = rest.get(tree..)?;
    let texts = std::str::from_utf8(texts).ok()?;
    texts.split('\0').map(|text| text.len().max(1)).max()
}

/// How many tokens a post-processor can make of one.
fn copies_of(step: &Value) -> usize {
    let Some(template) = step.get("single").and_then(Value::as_array) else {
        return match step["type"].as_str() {
            Some("ByteLevel" | "Sequence") => 1,
            // One before and one after.
            _ => 3,
        };
    };
    let special = step.get("special_tokens").and_then(Value::as_object);
    let ids = special.into_iter().flat_map(|tokens| tokens.values());
    let ids = ids.filter_map(|token| Some(token.get("ids")?.as_array()?.len()));
    template
        .len()
        .max(1)
        .saturating_mul(ids.max().unwrap_or(1).max(1))
}

/// Checks tokens that the library keeps in a tree of bytes.
fn check_tokens(mut tokens: Vec<String>) -> Result<(), String> {
    tokens.sort_unstable();
    let (mut beginnings, mut before) = (0, "");
    // The tokens that are prefixes of the current one, and itself.
    let mut nested: Vec<&str> = Vec::new();
    for token in &tokens {
        nested.truncate(nested.partition_point(|start| token.starts_with(start)));
        nested.push(token);
        if token.len() > LONGEST_TOKEN || nested.len() > MOST_NESTED {
            return Err(format!(
                "a token of {} bytes in its vocabulary, which begins with {} others: expected at most {LONGEST_TOKEN}, and \
                 fewer than {MOST_NESTED}",
                token.len(),
                nested.len() - 1
            ));
        }
        let shared = token
            .bytes()
            .zip(before.bytes())
            .take_while(|(a, b)| a == b);
        beginnings += token.len() - shared.count();
        before = token;
    }
    match beginnings <= MOST_BEGINNINGS {
        true => Ok(()),
        false => Err(format!(
            "the tokens of its vocabulary have {beginnings} different beginnings, expected at most {MOST_BEGINNINGS}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A tokenizer that works, with other parts.
    fn with(parts: &[(&str, Value)]) -> Result<BoundedTokenizer> {
        let golden = include_str!("../../../../tests/golden/captions/tokenizer.json");
        let mut file: Value = serde_json::from_str(golden).unwrap();
        for (name, part) in parts {
            file[name] = part.clone();
        }
        opened(&file.to_string())
    }

    fn opened(text: &str) -> Result<BoundedTokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, text).unwrap();
        BoundedTokenizer::open(&path)
    }

    #[track_caller]
    fn check_refused(part: &str, value: Value, expected: &str) {
        let error = with(&[(part, value)]).map(drop).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        assert!(error.contains(expected), "{error}");
    }

    fn replace(pattern: &str, content: &str) -> Value {
        json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
    }

    fn charsmap(texts: &[u8]) -> Value {
        let map = [&8_u32.to_le_bytes()[..], &[0; 8], texts].concat();
        json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(map)})
    }

    #[test]
    fn a_tokenizer_says_how_much_longer_a_text_may_become() {
        let mut golden = with(&[]).unwrap();
        // NFKC, an expression that becomes a space, Metaspace.
        assert_eq!(golden.growth, 12 * 2 * 4);
        let ids = golden.ids("a cat and the table", 10).unwrap();
        assert_eq!(ids, golden.ids("a cat and the table", 10).unwrap());
        assert!(ids.len() > 2 && golden.ids("a cat and the table", 3).unwrap().len() <= 3);
        for (step, growth) in [
            (replace("``", "\""), 1),
            (replace("ab", "abcde"), 3),
            (replace("", "x"), 2),
            (
                json!({"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "aa"}),
                3,
            ),
            (json!({"prepend": "ab"}), 36),
            (json!({"type": "Prepend", "prepend": "ab"}), 3),
            (charsmap(b"a\0bcd\0"), 3),
            (json!({"type": "ByteLevel"}), 4),
            (json!({"type": "StripAccents"}), 1),
        ] {
            assert_eq!(growth_of(&step), Ok(growth), "{step}");
        }
    }

    #[test]
    fn steps_that_make_a_text_longer_and_longer_are_refused() {
        let sequence = |list: &str, step: &Value, count: usize| {
            let steps: Vec<Value> = vec![step.clone(); count];
            json!({"type": "Sequence", list: steps})
        };
        let expected = "times as long, expected at most 1024";
        let double = replace("a", "aa");
        for count in [9, 28, 60] {
            let steps = sequence("normalizers", &double, count);
            check_refused("normalizer", steps.clone(), expected);
            check_refused("normalizer", sequence("normalizers", &steps, 1), expected);
        }
        check_refused(
            "normalizer",
            sequence("normalizers", &double, 64),
            "more than 64 steps",
        );
        // What is a list and a replacement at once.
        let mut both = replace("a", &"a".repeat(5000));
        both["normalizers"] = json!([]);
        check_refused("normalizer", both, expected);
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        check_refused(
            "pre_tokenizer",
            sequence("pretokenizers", &bytes, 6),
            expected,
        );
        check_refused("normalizer", charsmap(&[b'x'; 5000]), expected);
        for damaged in ["", "AAAA", "?", "/////w=="] {
            let step = json!({"type": "Precompiled", "precompiled_charsmap": damaged});
            check_refused("normalizer", step, "precompiled_charsmap is damaged");
        }
        let copy = json!({"Sequence": {"id": "A", "type_id": 0}});
        let template = |pieces: usize, ids: usize| {
            let special =
                json!({"</s>": {"id": "</s>", "ids": vec![1; ids], "tokens": vec!["</s>"; ids]}});
            json!({"type": "TemplateProcessing", "single": vec![copy.clone(); pieces], "pair": [], "special_tokens": special})
        };
        let expected = "tokens of one, expected at most 64";
        check_refused("post_processor", template(65, 1), expected);
        check_refused("post_processor", template(2, 33), expected);
        check_refused(
            "post_processor",
            sequence("processors", &template(2, 1), 7),
            expected,
        );
    }

    #[test]
    fn a_long_text_is_cut_to_what_it_may_grow_from() {
        let steps = vec![replace("a", "aa"); 7];
        let mut double = with(&[(
            "normalizer",
            json!({"type": "Sequence", "normalizers": steps}),
        )])
        .unwrap();
        assert_eq!(double.growth, 128 * 4);
        let ids = double.ids(&"a".repeat(20_000), 7).unwrap();
        assert!((1..=7).contains(&ids.len()), "{ids:?}");
        assert!(!double.ids(&"\u{e4}".repeat(20_000), 7).unwrap().is_empty());
    }

    #[test]
    fn vocabularies_that_take_much_memory_or_time_are_refused() {
        let unigrams = |tokens: Vec<String>| {
            let tokens: Vec<Value> = tokens.iter().map(|token| json!([token, -1.0])).collect();
            json!({"type": "Unigram", "unk_id": 0, "vocab": tokens})
        };
        let different = |count: usize| {
            let token = |i: usize| format!("{i:04}{}", "x".repeat(250));
            unigrams((0..count).map(token).collect())
        };
        check_refused("model", different(4200), "different beginnings");
        check_refused(
            "model",
            unigrams(vec!["x".repeat(257)]),
            "a token of 257 bytes",
        );
        let nested =
            |count: usize| unigrams((1..=count).map(|length| "x".repeat(length)).collect());
        check_refused("model", nested(65), "which begins with 64 others");
        assert!(with(&[("model", nested(64)), ("post_processor", Value::Null)]).is_ok());
        let words = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
                           "max_input_chars_per_word": 1_000_000, "vocab": {"a": 0}});
        check_refused("model", words, "max_input_chars_per_word");
        let long = json!([{"id": 0, "content": "x".repeat(1 << 20), "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": true, "special": false}]);
        check_refused("added_tokens", long, "its added_tokens have 1048576 bytes");
        for part in ["normalizer", "model"] {
            let text = format!("{{\"{part}\": [{}0]}}", "[0],".repeat(1 << 20));
            let error = opened(&text).map(drop).unwrap_err().to_string();
            assert!(error.contains("more than 192 MiB of memory"), "{error}");
        }
    }
}
