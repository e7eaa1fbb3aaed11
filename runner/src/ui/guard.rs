//! Access control: a request's headers are checked before anything else.
//!
//! - A page on another site can make a browser send requests here, even under a name of its own (DNS rebinding). `Host` must
//!   therefore be a name of ours, `Origin` the same, and what a browser says of where a request comes from (`Sec-Fetch-Site`)
//!   must not be another site, unless somebody followed a link.
//! - Other people reach an address that is not loopback, and other users of this machine reach loopback: where the first is
//!   so, or something could be changed, a random token has to be shown. It is in the address that is opened, and then in a
//!   cookie that no script can read.
//! - What changes something has to carry a second random text that only our pages have.
//!
//! Answers tell browsers to run no script and load nothing but our own, and to let nobody frame us ([`headers`]).

use std::io::Read;
use std::net::IpAddr;

use hyper::header::{COOKIE, HOST, ORIGIN};
use hyper::{HeaderMap, Method, Uri};

/// The name of the cookie with the token.
const COOKIE_NAME: &str = "retort_token";

/// The headers of every answer.
const HEADERS: [(&str, &str); 7] = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
         form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    // Without a referrer, browsers send the origin `null` for our own forms, and these could not be distinguished from others.
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    (
        "permissions-policy",
        "camera=(), geolocation=(), microphone=()",
    ),
];

/// Decides which requests are allowed.
#[derive(Debug, Clone)]
pub struct Guard {
    /// The token that a request has to present, if one is needed.
    token: Option<String>,
    /// The text that forms have to contain.
    seal: String,
    /// Whether other machines can reach the server.
    loopback: bool,
    /// Our names besides `localhost` and addresses.
    names: Vec<String>,
}

/// What to do with a request.
#[derive(Debug, PartialEq)]
pub enum AccessDecision {
    /// Answer it.
    Allow,
    /// Set the cookie, and redirect the browser to the same page without the token.
    SetCookie {
        /// The cookie.
        cookie: String,
        /// The page's address.
        place: String,
    },
    /// Refuse it, for this reason.
    Refuse(&'static str),
}

impl Guard {
    /// For a server with this address and these names; with a token if one is needed.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new(address: IpAddr, names: Vec<String>, write: bool) -> std::io::Result<Self> {
        let loopback = address.is_loopback();
        Ok(Self {
            token: (!loopback || write).then(random).transpose()?,
            seal: random()?,
            loopback,
            names,
        })
    }

    /// The token that a request has to present.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// The text that forms have to contain.
    pub fn seal(&self) -> &str {
        &self.seal
    }

    /// Whether a form contains it.
    pub fn is_sealed(&self, shown: Option<&str>) -> bool {
        shown.is_some_and(|shown| same(shown, &self.seal))
    }

    /// The headers of every answer.
    pub fn headers() -> &'static [(&'static str, &'static str)] {
        &HEADERS
    }

    /// What to do with a request.
    pub fn decide(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> AccessDecision {
        let mut hosts = headers.get_all(HOST).iter();
        let host = match (hosts.next().map(|host| host.to_str()), hosts.next()) {
            (Some(Ok(host)), None) => host,
            _ => return AccessDecision::Refuse("a request has one Host header"),
        };
        let other_authority = uri.authority().is_some_and(|named| named.as_str() != host);
        if other_authority || !self.is_ours(host) {
            return AccessDecision::Refuse(
                "this name is not one of this server's: open it as localhost, or name it with --allow-host",
            );
        }
        let read = matches!(*method, Method::GET | Method::HEAD);
        match headers.get(ORIGIN).map(|origin| origin.to_str()) {
            None if read => {}
            Some(Ok(origin)) if is_origin(origin, host) => {}
            _ => return AccessDecision::Refuse("the request comes from a page of another site"),
        }
        let says = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let foreign = matches!(says("sec-fetch-site"), Some("cross-site" | "same-site"));
        let followed = read
            && says("sec-fetch-mode") == Some("navigate")
            && says("sec-fetch-dest") == Some("document");
        if foreign && !followed {
            return AccessDecision::Refuse("the request comes from a page of another site");
        }
        match &self.token {
            None => AccessDecision::Allow,
            Some(token) => enter(token, uri, headers),
        }
    }

    /// Whether a `Host` header names this server. The port does not matter: it may have been forwarded.
    fn is_ours(&self, host: &str) -> bool {
        let (name, rest) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some(address) => address,
            None => host.split_at(host.find(':').unwrap_or(host.len())),
        };
        let is_port = |port: &str| port.bytes().all(|digit| digit.is_ascii_digit());
        if !rest.is_empty() && !rest.strip_prefix(':').is_some_and(is_port) {
            return false;
        }
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let named = self.names.iter().any(|own| own.eq_ignore_ascii_case(&name));
        match name.parse::<IpAddr>() {
            // Nobody else can own an address as a name.
            Ok(address) => !self.loopback || address.is_loopback() || named,
            Err(_) => name == "localhost" || named,
        }
    }
}

fn enter(token: &str, uri: &Uri, headers: &HeaderMap) -> AccessDecision {
    let cookies = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let shown = cookies.flat_map(|line| line.split(';')).any(|cookie| {
        let own = cookie.trim().split_once('=');
        own.is_some_and(|(name, value)| name == COOKIE_NAME && same(value, token))
    });
    if shown {
        return AccessDecision::Allow;
    }
    let query = super::request::Fields::read(uri.query().unwrap_or_default());
    match query.get("token") {
        Some(shown) if same(shown, token) => AccessDecision::SetCookie {
            cookie: format!("{COOKIE_NAME}={token}; HttpOnly; SameSite=Strict; Path=/"),
            place: query.without("token").link(&local(uri.path())),
        },
        _ => AccessDecision::Refuse("open the address that `retort ui` printed: it has the token"),
    }
}

/// A path that a browser cannot mistake for anything else: `//host` would be another server.
fn local(path: &str) -> String {
    format!("/{}", path.trim_start_matches(['/', '\\']))
}

fn is_origin(origin: &str, host: &str) -> bool {
    let rest = origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"));
    rest.is_some_and(|rest| rest.eq_ignore_ascii_case(host))
}

/// Compares two secrets in constant time.
fn same(shown: &str, own: &str) -> bool {
    blake3::hash(shown.as_bytes()) == blake3::hash(own.as_bytes())
}

fn random() -> std::io::Result<String> {
    let mut bytes = [0; 24];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const EVERYWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

    fn decide(
        guard: &Guard,
        method: Method,
        uri: &str,
        headers: &[(&str, &str)],
    ) -> AccessDecision {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name = hyper::header::HeaderName::from_bytes(name.as_bytes()).unwrap();
            map.append(name, value.parse().unwrap());
        }
        guard.decide(&method, &uri.parse().unwrap(), &map)
    }

    fn is_welcome(guard: &Guard, method: Method, headers: &[(&str, &str)]) -> bool {
        decide(guard, method, "/", headers) == AccessDecision::Allow
    }

    #[test]
    fn only_names_of_ours_are_served() {
        let guard = Guard::new(HERE, vec!["box.lan".into()], false).unwrap();
        for host in [
            "localhost",
            "localhost:6006",
            "127.0.0.1:1",
            "[::1]:6006",
            "LOCALHOST.",
            "box.lan:80",
        ] {
            assert!(is_welcome(&guard, Method::GET, &[("host", host)]), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "10.0.0.1:6006",
            "127.0.0.1.evil.example",
            "",
            "[evil]",
            "[::1]evil.example",
            "[::1].evil.example:80",
            "[::1]:80.evil.example",
            "localhost:evil.example",
        ] {
            assert!(
                !is_welcome(&guard, Method::GET, &[("host", host)]),
                "{host}"
            );
        }
        assert!(!is_welcome(&guard, Method::GET, &[]));
        assert!(!is_welcome(
            &guard,
            Method::GET,
            &[("host", "localhost"), ("host", "localhost")]
        ));
        let absolute = decide(
            &guard,
            Method::GET,
            "http://evil.example/",
            &[("host", "localhost")],
        );
        assert!(matches!(absolute, AccessDecision::Refuse(_)));
    }

    #[test]
    fn pages_of_other_sites_cannot_ask() {
        let guard = Guard::new(HERE, Vec::new(), false).unwrap();
        let host = ("host", "localhost:6006");
        let check = |method: Method, more: &[(&'static str, &'static str)], welcome: bool| {
            let headers = [&[host], more].concat();
            assert_eq!(
                is_welcome(&guard, method.clone(), &headers),
                welcome,
                "{method} {more:?}"
            );
        };
        check(Method::GET, &[("origin", "http://localhost:6006")], true);
        check(Method::GET, &[("origin", "http://localhost:7007")], false);
        check(Method::GET, &[("origin", "http://evil.example")], false);
        check(Method::GET, &[("origin", "null")], false);
        check(Method::POST, &[], false);
        check(Method::POST, &[("origin", "http://localhost:6006")], true);
        check(Method::POST, &[("origin", "null")], false);
        check(Method::GET, &[("sec-fetch-site", "same-origin")], true);
        check(
            Method::GET,
            &[
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "no-cors"),
                ("sec-fetch-dest", "image"),
            ],
            false,
        );
        let link = [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        check(Method::GET, &link, true);
        check(
            Method::POST,
            &[link.as_slice(), &[("origin", "http://localhost:6006")]].concat(),
            false,
        );
        let frame = [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "iframe"),
        ];
        check(Method::GET, &frame, false);
    }

    #[test]
    fn a_token_is_needed_away_from_loopback_and_to_write() {
        assert!(
            Guard::new(HERE, Vec::new(), false)
                .unwrap()
                .token()
                .is_none()
        );
        assert!(
            Guard::new(HERE, Vec::new(), true)
                .unwrap()
                .token()
                .is_some()
        );
        let guard = Guard::new(EVERYWHERE, Vec::new(), false).unwrap();
        let token = guard.token().unwrap().to_owned();
        let host = ("host", "10.1.2.3:6006");
        assert!(!is_welcome(&guard, Method::GET, &[host]));
        let other = format!("/?token={}", "0".repeat(token.len()));
        assert!(matches!(
            decide(&guard, Method::GET, &other, &[host]),
            AccessDecision::Refuse(_)
        ));
        let entered = decide(
            &guard,
            Method::GET,
            &format!("//evil.example/run/x?token={token}&a=b"),
            &[host],
        );
        let AccessDecision::SetCookie { cookie, place } = entered else {
            panic!("{entered:?}")
        };
        assert_eq!(place, "/evil.example/run/x?a=b");
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
        let shown = format!("other=1; {COOKIE_NAME}={token}");
        assert!(is_welcome(&guard, Method::GET, &[host, ("cookie", &shown)]));
        let wrong = format!("{COOKIE_NAME}={token}0");
        assert!(!is_welcome(
            &guard,
            Method::GET,
            &[host, ("cookie", &wrong)]
        ));
        assert!(!is_welcome(
            &guard,
            Method::GET,
            &[("host", "evil.example"), ("cookie", &shown)]
        ));
        assert!(
            guard.is_sealed(Some(guard.seal()))
                && !guard.is_sealed(None)
                && !guard.is_sealed(Some(""))
        );
    }

    #[test]
    fn answers_forbid_what_is_not_ours() {
        let policy = Guard::headers()
            .iter()
            .find(|(name, _)| *name == "content-security-policy")
            .unwrap()
            .1;
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
        assert!(!policy.contains("unsafe") && !policy.contains("data:") && !policy.contains('*'));
    }
}
