//! A browser's request: path, query and form, decoded and bounded.

use hyper::Method;

/// The most fields of a query or a form; others are ignored.
const FIELDS: usize = 4096;

/// A request.
#[derive(Debug, Clone)]
pub struct PageRequest {
    /// The method.
    pub method: Method,
    /// The path, decoded, without its slashes.
    pub path: Vec<String>,
    /// The query, after the `?`.
    pub query: Fields,
    /// The posted form.
    pub form: Fields,
}

/// Names with values, in order; a name may occur more than once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fields(Vec<(String, String)>);

impl Fields {
    /// Reads `a=1&b=2`.
    pub fn read(text: &str) -> Self {
        let pairs = form_urlencoded::parse(text.as_bytes()).take(FIELDS);
        Self(
            pairs
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }

    /// The first value of a name that is not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        let named = self
            .0
            .iter()
            .find(|(known, value)| known == name && !value.is_empty());
        named.map(|(_, value)| value.as_str())
    }

    /// The values of a name that are not empty.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self
            .0
            .iter()
            .filter(move |(known, value)| known == name && !value.is_empty());
        named.map(|(_, value)| value.as_str())
    }

    /// The value of a name as a number, if it is one.
    pub fn number<N: std::str::FromStr>(&self, name: &str) -> Option<N> {
        self.get(name)?.parse().ok()
    }

    /// All pairs.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The same with a single value of a name; without the name if the value is empty.
    pub fn with(&self, name: &str, value: &str) -> Self {
        let mut changed = self.without(name);
        changed.push(name, value);
        changed
    }

    /// The same without a name.
    pub fn without(&self, name: &str) -> Self {
        Self(
            self.0
                .iter()
                .filter(|(known, _)| known != name)
                .cloned()
                .collect(),
        )
    }

    /// Adds a value, unless it is empty.
    pub fn push(&mut self, name: &str, value: &str) {
        if !value.is_empty() {
            self.0.push((name.to_owned(), value.to_owned()));
        }
    }

    /// A link to a path with these fields.
    pub fn link(&self, path: &str) -> String {
        if self.0.is_empty() {
            return path.to_owned();
        }
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(self.pairs().filter(|(_, value)| !value.is_empty()));
        format!("{path}?{}", query.finish())
    }
}

/// A link to a path with these names and values.
pub fn link(path: &str, fields: &[(&str, &str)]) -> String {
    let mut all = Fields::default();
    for (name, value) in fields {
        all.push(name, value);
    }
    all.link(path)
}

/// A path segment, encoded.
pub fn segment(text: &str) -> String {
    let encoded: String = form_urlencoded::byte_serialize(text.as_bytes()).collect();
    encoded.replace('+', "%20")
}

/// The segments of a path, decoded; None if it is not UTF-8, or has `..`.
pub fn path(text: &str) -> Option<Vec<String>> {
    let pieces = text.split('/').filter(|piece| !piece.is_empty());
    let decoded = pieces.map(|piece| {
        let decoded = decode(piece)?;
        let leads_up = matches!(decoded.as_str(), "." | "..");
        (!leads_up && !decoded.contains(['/', '\\', '\0'])).then_some(decoded)
    });
    decoded.collect()
}

fn decode(piece: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(piece.len());
    let mut rest = piece.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next()?, rest.next()?];
        let digits = std::str::from_utf8(&digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_changed_and_written() {
        let fields = Fields::read("where=a+%3C+3&run=x&run=y&empty=");
        assert_eq!(fields.get("where"), Some("a < 3"));
        assert_eq!(fields.all("run").collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(fields.get("empty"), None);
        let changed = fields.with("where", "b & c").without("run");
        assert_eq!(changed.link("/"), "/?where=b+%26+c");
        assert_eq!(link("/run", &[("a", "\"<&")]), "/run?a=%22%3C%26");
    }

    #[test]
    fn paths_are_decoded_and_lead_nowhere_else() {
        let check = |text: &str, expected: Option<&[&str]>| {
            let found = path(text);
            let found: Option<Vec<&str>> = found
                .as_ref()
                .map(|all| all.iter().map(String::as_str).collect());
            assert_eq!(found.as_deref(), expected, "{text}");
        };
        check("/", Some(&[]));
        check("/run/a%20b", Some(&["run", "a b"]));
        check("/file/../x", None);
        check("/file/%2e%2e/x", None);
        check("/file/..%2fx", None);
        check("/a%5cb", None);
        check("/%ff", None);
        check("/%zz", None);
        check("/a%00", None);
        assert_eq!(path(&format!("/{}", segment("<b> +%/.."))), None);
        assert_eq!(
            path(&format!("/{}", segment("<b> +%"))),
            Some(vec!["<b> +%".to_owned()])
        );
    }
}
