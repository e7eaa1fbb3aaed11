//! A browser, driven through chromedriver: the WebDriver commands that these tests need, over plain HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long to wait for something that must appear, on a machine that may be very busy.
const PATIENCE: Duration = Duration::from_secs(300);
/// The key of elements in answers.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// Finds parts that somebody could not use or read.
const AUDIT: &str = r#"
const wrong = [];
const shown = element => element.checkVisibility({visibilityProperty: true}) && !element.closest('[hidden], noscript, .visually-hidden, .skip');
const named = element => [element.getAttribute('aria-label'), element.title, element.textContent, element.placeholder,
  ...[...(element.labels ?? [])].map(label => label.textContent),
  ...[...element.querySelectorAll('img')].map(image => image.alt)].some(text => text?.trim());
for (const element of document.querySelectorAll('button, a[href], summary')) if (shown(element) && !named(element)) wrong.push(`no name: ${element.outerHTML.slice(0, 90)}`);
for (const element of document.querySelectorAll('input:not([type=hidden]), select, textarea'))
  if (shown(element) && !element.labels?.length && !element.getAttribute('aria-label')) wrong.push(`no label: ${element.outerHTML.slice(0, 90)}`);
for (const element of document.querySelectorAll('img, svg[role=img]'))
  if (!element.hasAttribute('alt') && !element.hasAttribute('aria-label')) wrong.push(`no text: ${element.outerHTML.slice(0, 90)}`);
for (const element of document.querySelectorAll('thead th')) if (!element.scope) wrong.push(`a head of nothing: ${element.textContent}`);
if (!document.documentElement.lang || document.querySelectorAll('main').length !== 1 || !document.querySelector('h1')) wrong.push('no language, main part or heading');
const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const mixed = layers => {
  paint.globalAlpha = 1; paint.fillStyle = '#fff'; paint.fillRect(0, 0, 1, 1);
  for (const [color, opacity] of layers) { paint.globalAlpha = opacity; paint.fillStyle = color; paint.fillRect(0, 0, 1, 1); }
  return paint.getImageData(0, 0, 1, 1).data;
};
const light = color => [0.2126, 0.7152, 0.0722].reduce((sum, weight, place) => {
  const part = color[place] / 255;
  return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
}, 0);
const seen = new Set();
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text = texts.nextNode(); text; text = texts.nextNode()) {
  const element = text.parentElement;
  if (!text.data.trim() || element.closest('title, option, datalist, script, style') || !shown(element)) continue;
  const style = getComputedStyle(element);
  const inside = element instanceof SVGElement;
  const above = [];
  for (let one = element; one; one = one.parentElement) above.unshift(one);
  let opacity = 1;
  const layers = above.map(one => { opacity *= Number(getComputedStyle(one).opacity); return [getComputedStyle(one).backgroundColor, 1]; });
  const color = inside ? style.fill : style.color;
  const key = JSON.stringify([color, opacity, layers, style.fontSize]);
  if (seen.has(key)) continue;
  seen.add(key);
  const [one, other] = [light(mixed(layers)), light(mixed([...layers, [color, opacity]]))].sort((a, b) => b - a);
  const ratio = (one + 0.05) / (other + 0.05);
  const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5) && !element.closest(':disabled')) wrong.push(`${ratio.toFixed(2)} to 1: ${text.data.trim().slice(0, 40)}`);
}
return wrong;
"#;

/// A browser with one window.
pub struct Browser {
    driver: Child,
    /// The file to which it keeps writing.
    _said: BufReader<ChildStdout>,
    port: u16,
    session: String,
    _profile: TempDir,
}

/// An element of a page.
pub struct Element(String);

impl Browser {
    /// Starts a browser; None, with a loud message, if there is none here.
    pub fn start() -> Option<Self> {
        let found = |name: &str| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path)
                .map(|dir| dir.join(name))
                .find(|program| program.is_file())
        };
        let (Some(chromium), Some(driver)) = (found("chromium"), found("chromedriver")) else {
            retort_tests::skip::skip(
                "chromium and chromedriver are not installed: .ci/packages installs them",
            );
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut driver = Command::new(driver)
            .arg("--port=0")
            .env("HOME", profile.path())
            .env("TMPDIR", profile.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It prints its port once it listens.
        let mut said = BufReader::new(driver.stdout.take().unwrap());
        let port = said
            .by_ref()
            .lines()
            .map_while(Result::ok)
            .find_map(|line| {
                let (_, port) = line.split_once(" started successfully on port ")?;
                port.trim_end_matches('.').parse().ok()
            });
        let mut browser = Self {
            driver,
            _said: said,
            port: port.expect("chromedriver starts"),
            session: String::new(),
            _profile: profile,
        };
        let data = browser._profile.path().join("data");
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--force-color-profile=srgb",
            &format!("--user-data-dir={}", data.display()),
        ];
        let asked = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
        }}});
        let made = browser.call("POST", "/session", &asked);
        browser.session = format!(
            "/session/{}",
            made["sessionId"]
                .as_str()
                .unwrap_or_else(|| panic!("{made}"))
        );
        browser.resize(1280, 900);
        Some(browser)
    }

    /// The size of the viewport.
    pub fn resize(&self, width: u32, height: u32) {
        // A window cannot be as narrow as a phone's, so the page's metrics are overridden.
        let params = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500});
        self.devtools("Emulation.setDeviceMetricsOverride", params);
    }

    /// Whether people prefer dark pages.
    pub fn dark(&self, dark: bool) {
        let value = if dark { "dark" } else { "light" };
        self.devtools(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": "prefers-color-scheme", "value": value}]}),
        );
    }

    /// Whether scripts run on the pages that are opened from now on.
    pub fn scripts(&self, run: bool) {
        self.devtools(
            "Emulation.setScriptExecutionDisabled",
            json!({"value": !run}),
        );
    }

    fn devtools(&self, command: &str, params: Value) {
        self.post(
            "/goog/cdp/execute",
            json!({"cmd": command, "params": params}),
        );
    }

    pub fn open(&self, address: &str) {
        self.post("/url", json!({"url": address}));
    }

    /// Opens another tab, for all further steps.
    pub fn tab(&self) {
        let made = self.post("/window/new", json!({"type": "tab"}));
        self.post("/window", json!({"handle": made["handle"]}));
    }

    pub fn back(&self) {
        self.post("/back", json!({}));
    }

    pub fn address(&self) -> String {
        self.get("/url").as_str().unwrap().to_owned()
    }

    /// The value of a script's `return`.
    pub fn script(&self, script: &str) -> Value {
        self.post("/execute/sync", json!({"script": script, "args": []}))
    }

    /// The text of the page.
    pub fn text(&self) -> String {
        let text = self.script("return document.body.innerText");
        text.as_str().unwrap_or_default().to_owned()
    }

    pub fn find(&self, selector: &str) -> Option<Element> {
        let found = self.post(
            "/elements",
            json!({"using": "css selector", "value": selector}),
        );
        Some(Element(
            found.as_array()?.first()?[ELEMENT].as_str()?.to_owned(),
        ))
    }

    pub fn count(&self, selector: &str) -> usize {
        let found = self.post(
            "/elements",
            json!({"using": "css selector", "value": selector}),
        );
        found.as_array().map_or(0, Vec::len)
    }

    /// Clicks on an element, which may just be replaced by a newer one.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        self.wait(&format!("a click on {selector}"), || {
            let element = self.find(selector)?;
            let path = format!("{}/element/{}/click", self.session, element.0);
            match self.attempt("POST", &path, &json!({})) {
                Ok(_) => Some(()),
                Err(why) if why.contains("stale element") || why.contains("click intercepted") => {
                    None
                }
                Err(why) => panic!("{why}"),
            }
        });
    }

    /// Types into an element.
    #[track_caller]
    pub fn enter(&self, selector: &str, text: &str) {
        let element = self.wait_for(selector);
        self.post(&format!("/element/{}/clear", element.0), json!({}));
        self.post(
            &format!("/element/{}/value", element.0),
            json!({"text": text}),
        );
    }

    /// Presses keys outside of any input field.
    pub fn keys(&self, keys: &str) {
        self.wait_until("document.documentElement.classList.contains('js')");
        let actions: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key.to_string()}))
            })
            .collect();
        self.post(
            "/actions",
            json!({"actions": [{"type": "key", "id": "keys", "actions": actions}]}),
        );
    }

    /// Drags from one place of an element to another, in pixels from its middle.
    #[track_caller]
    pub fn drag(&self, selector: &str, from: i32, to: i32) {
        let element = self.wait_for(selector);
        let at = |x: i32| json!({"type": "pointerMove", "duration": 50, "x": x, "y": 0, "origin": {ELEMENT: element.0}});
        let actions = json!([at(from), {"type": "pointerDown", "button": 0}, at((from + to) / 2), at(to), {"type": "pointerUp", "button": 0}]);
        self.post("/actions", json!({"actions": [{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": actions}]}));
    }

    #[track_caller]
    pub fn wait_for(&self, selector: &str) -> Element {
        self.wait(selector, || self.find(selector))
    }

    /// Waits until a script returns a truthy value.
    #[track_caller]
    pub fn wait_until(&self, script: &str) {
        self.wait(script, || {
            let value = self.script(&format!("return Boolean({script})"));
            (value == true).then_some(())
        });
    }

    #[track_caller]
    pub fn wait_for_text(&self, text: &str) {
        self.wait(text, || self.text().contains(text).then_some(()));
    }

    #[track_caller]
    fn wait<T>(&self, what: &str, look: impl Fn() -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(
                Instant::now() < until,
                "`{what}` did not come at {}:\n{}",
                self.address(),
                self.text()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Expects a sound page: no error, no violation of its policy, nothing wider than the window.
    #[track_caller]
    pub fn expect_sound(&self) {
        let log = self.post("/se/log", json!({"type": "browser"}));
        let errors: Vec<&Value> = log
            .as_array()
            .into_iter()
            .flatten()
            .filter(|entry| entry["level"] == "SEVERE")
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", self.address());
        let wider = self.script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth",
        );
        assert!(
            wider.as_i64().unwrap() <= 1,
            "{} is {wider} pixels wider than the window",
            self.address()
        );
    }

    /// Expects an accessible page: controls and pictures have names, texts have enough contrast (4.5 to 1; 3 to 1 for large
    /// ones), tables have heads.
    #[track_caller]
    pub fn expect_accessible(&self) {
        let found = self.script(AUDIT);
        assert_eq!(found, json!([]), "{}", self.address());
    }

    /// Drops the browser's complaints so far, which were expected.
    pub fn forgive(&self) {
        self.post("/se/log", json!({"type": "browser"}));
    }

    /// Saves a picture of the whole page.
    pub fn keep(&self, name: &str) {
        let taken = self.post(
            "/goog/cdp/execute",
            json!({"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": true, "format": "png"}}),
        );
        let bytes = base64(taken["data"].as_str().unwrap());
        let folder = screenshots();
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{name}.png"));
        std::fs::write(&path, bytes).unwrap();
        println!("{}", path.display());
    }

    fn get(&self, path: &str) -> Value {
        self.call("GET", &format!("{}{path}", self.session), &Value::Null)
    }

    fn post(&self, path: &str, body: Value) -> Value {
        self.call("POST", &format!("{}{path}", self.session), &body)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        self.attempt(method, path, body)
            .unwrap_or_else(|why| panic!("{why}"))
    }

    fn attempt(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let (status, answer) = request(
            self.port,
            method,
            path,
            &[("content-type", "application/json")],
            &body,
        );
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        match status {
            200 => Ok(answer["value"].clone()),
            _ => Err(format!("{method} {path}: {answer:#}")),
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            // This ends the browser; if it does not answer, killing its driver does.
            let path = self.session.clone();
            let port = self.port;
            let _ = std::panic::catch_unwind(|| request(port, "DELETE", &path, &[], ""));
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// The directory of saved pictures.
pub fn screenshots() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .unwrap()
        .join("ui-screenshots")
}

/// Sends a request to a server on this machine. Returns the status and the content.
pub fn request(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, Vec<u8>) {
    let (status, _, content) = answer(port, method, path, headers, body);
    (status, content)
}

/// The same with the answer's headers, in lower case.
pub fn answer(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    if !headers.iter().any(|(name, _)| *name == "host") {
        head += &format!("host: localhost:{port}\r\n");
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream
        .write_all(format!("{head}\r\n{body}").as_bytes())
        .unwrap();
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let status = first
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or(0);
    let mut answered = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() <= 2 {
            break;
        }
        answered += &line.to_ascii_lowercase();
    }
    let mut content = Vec::new();
    let length = answered
        .lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    match length {
        Some(length) => {
            content = vec![0; length];
            reader.read_exact(&mut content).unwrap();
        }
        None if answered.contains("transfer-encoding: chunked") => loop {
            let mut size = String::new();
            reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).unwrap();
            if size == 0 {
                break;
            }
            content.extend_from_slice(&chunk[..size]);
        },
        None => drop(reader.read_to_end(&mut content)),
    }
    (status, answered, content)
}

fn base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for four in text.as_bytes().chunks(4) {
        let used = four.iter().filter(|byte| **byte != b'=').count();
        let bits = four.iter().fold(0_u32, |bits, &byte| {
            bits << 6 | u32::from(if byte == b'=' { 0 } else { value(byte) })
        });
        bytes.extend_from_slice(&bits.to_be_bytes()[1..used]);
    }
    bytes
}
