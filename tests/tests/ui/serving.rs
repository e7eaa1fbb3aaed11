//! The server as a process: what it answers and refuses, without a browser.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Stdio};

use super::browser::{answer, request};
use super::fixture;
use super::lab::{Lab, block_on, signal_process};

/// A running server.
pub struct Server {
    child: Child,
    /// Its address.
    pub port: u16,
    /// Its output.
    pub printed: String,
}

impl Server {
    /// Serves a lab's store on a free port.
    pub fn start(lab: &Lab, arguments: &[&str]) -> Self {
        let arguments = [&["ui", "--port", "0"], arguments].concat();
        let mut child = lab
            .command(&arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut printed = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut printed)
            .unwrap();
        let rest = printed
            .trim()
            .strip_prefix("http://localhost:")
            .unwrap_or_else(|| panic!("{printed}"));
        let port = rest.split('/').next().unwrap().parse().unwrap();
        Self {
            child,
            port,
            printed: printed.trim().to_owned(),
        }
    }

    pub fn at(&self, path: &str) -> String {
        format!("http://localhost:{}{path}", self.port)
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let (status, content) = request(self.port, "GET", path, &[], "");
        (status, String::from_utf8_lossy(&content).into_owned())
    }

    fn post(&self, path: &str, cookie: &str, body: &str) -> (u16, String) {
        let origin = format!("http://localhost:{}", self.port);
        let headers = [
            ("origin", origin.as_str()),
            ("cookie", cookie),
            ("content-type", "application/x-www-form-urlencoded"),
        ];
        let (status, content) = request(self.port, "POST", path, &headers, body);
        (status, String::from_utf8_lossy(&content).into_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn served(arguments: &[&str]) -> (Lab, fixture::FixtureRuns, Server) {
    let lab = Lab::new(&[]);
    let made = block_on(fixture::make(&lab.store_dir()));
    let server = Server::start(&lab, arguments);
    (lab, made, server)
}

#[test]
fn ctrl_c_ends_it_cleanly_and_others_are_told_of_a_taken_port() {
    let (lab, _, mut server) = served(&[]);
    let port = server.port.to_string();
    lab.retort(&["ui", "--port", &port])
        .expect(1)
        .saying(&["cannot listen on 127.0.0.1:", "--port 0"]);
    lab.retort(&["runs", "list", "--store", "another"])
        .expect(2)
        .saying(&["only `retort ui`"]);
    // A client listens for events.
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream
        .write_all(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .unwrap();
    let mut first = String::new();
    BufReader::new(&stream).read_line(&mut first).unwrap();
    assert!(first.contains("200"), "{first}");
    signal_process(server.child.id(), libc::SIGINT);
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let empty = Lab::new(&[]);
    empty
        .retort(&["ui", "--port", "0"])
        .expect(4)
        .saying(&["retort run RECIPE"]);
}

#[test]
fn a_store_that_another_machine_has_taken_up_is_shown_no_more() {
    let (lab, made, server) = served(&[]);
    let run = format!("/run/{}", made.first);
    assert_eq!(server.get(&run).0, 200);
    let claim = lab.claim_elsewhere();
    let (status, text) = server.get(&run);
    assert!(status == 409 && text.contains("login2"), "{status}: {text}");
    std::fs::remove_file(claim).unwrap();
    assert_eq!(server.get(&run).0, 200);
}

#[test]
fn other_names_and_other_sites_are_refused() {
    let (_lab, made, server) = served(&[]);
    let status = |headers: &[(&str, &str)]| request(server.port, "GET", "/", headers, "").0;
    assert_eq!(status(&[]), 200);
    assert_eq!(status(&[("host", "127.0.0.1:1")]), 200);
    assert_eq!(status(&[("host", "evil.example")]), 403);
    assert_eq!(status(&[("origin", "http://evil.example")]), 403);
    assert_eq!(
        status(&[
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "no-cors")
        ]),
        403
    );
    let (_, headers, _) = answer(server.port, "GET", &format!("/run/{}", made.first), &[], "");
    for expected in [
        "content-security-policy: default-src 'none'",
        "x-content-type-options: nosniff",
        "frame-ancestors 'none'",
        "cache-control: no-store",
    ] {
        assert!(headers.contains(expected), "{headers}");
    }
    assert_eq!(request(server.port, "DELETE", "/", &[], "").0, 403);
    assert_eq!(
        server
            .post("/change/note", "", &format!("run={}&note=x", made.first))
            .0,
        403
    );
}

#[test]
fn nothing_outside_of_artifacts_is_served() {
    let (lab, made, server) = served(&[]);
    let hash = &made.samples;
    let dir = lab.store_dir().join("artifacts").join(hash);
    let (status, headers, content) = answer(
        server.port,
        "GET",
        &format!("/file/{hash}?path=grid.png"),
        &[],
        "",
    );
    assert_eq!(
        (status, content),
        (200, std::fs::read(dir.join("grid.png")).unwrap())
    );
    assert!(
        headers.contains("content-type: image/png") && headers.contains("immutable"),
        "{headers}"
    );
    let (_, headers, _) = answer(
        server.port,
        "GET",
        &format!("/file/{hash}?path=manifest.json"),
        &[],
        "",
    );
    assert!(
        headers.contains("application/octet-stream") && headers.contains("attachment"),
        "{headers}"
    );
    for path in [
        "../../history.db",
        "..%2F..%2Fhistory.db",
        "/etc/passwd",
        "grid.png/",
        "",
        "nothing.png",
    ] {
        assert_eq!(
            server.get(&format!("/file/{hash}?path={path}")).0,
            404,
            "{path}"
        );
    }
    let nobodys = "0".repeat(64);
    for address in [
        "/file/..?path=history.db".to_owned(),
        "/file/%2e%2e?path=history.db".to_owned(),
        format!("/file/{nobodys}?path=grid.png"),
        "/assets/../app.js".to_owned(),
        "/sample/history.db/1.png".to_owned(),
        format!("/sample/{hash}/40.png"),
        format!("/sample/{hash}/-1.png"),
        format!("/sample/{hash}/99999999999999999999.png"),
    ] {
        assert_eq!(server.get(&address).0, 404, "{address}");
    }
    assert_eq!(server.get(&format!("/sample/{hash}/39.png")).0, 200);
    // A listed file that has become a link to something else.
    replace_by_link(&dir.join("grid.png"));
    let (status, text) = server.get(&format!("/file/{hash}?path=grid.png"));
    assert!(
        status == 500 && text.contains("symbolic link"),
        "{status} {text}"
    );
    // A history with an artifact that lists a path to the outside.
    block_on(async {
        let store = retort::store::Store::open(&lab.store_dir(), retort::store::Access::ReadWrite)
            .await
            .unwrap();
        let list =
            serde_json::json!([{"path": "../../history.db", "size": 10, "hash": ""}]).to_string();
        sqlx::query("update artifacts set files = ?1 where hash = ?2")
            .bind(list)
            .bind(hash)
            .execute(store.pool())
            .await
            .unwrap();
        store.close().await;
    });
    let (status, text) = server.get(&format!("/file/{hash}?path=../../history.db"));
    assert!(
        status == 500 && text.contains("leaves the artifact"),
        "{status} {text}"
    );
}

fn replace_by_link(file: &Path) {
    let folder = file.parent().unwrap();
    let mut mode = std::fs::metadata(folder).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
    std::fs::set_permissions(folder, mode).unwrap();
    std::fs::remove_file(file).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", file).unwrap();
}

#[test]
fn hostile_samples_are_refused_within_bounds() {
    let (lab, made, server) = served(&[]);
    let dir = lab.store_dir().join("artifacts").join(&made.samples);
    let manifest = dir.join("manifest.json");
    let whole: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    let check = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = whole.clone();
        change(&mut changed);
        let mut mode = std::fs::metadata(&manifest).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o644);
        std::fs::set_permissions(&manifest, mode).unwrap();
        std::fs::write(&manifest, changed.to_string()).unwrap();
        let (status, text) = server.get(&format!("/sample/{}/0.png", made.samples));
        assert!(
            status == 500 && text.contains("cannot be read"),
            "{changed}: {status} {text}"
        );
    };
    check(&|manifest| manifest["image"] = serde_json::json!([3, 1u64 << 40, 1u64 << 40]));
    check(&|manifest| manifest["image"] = serde_json::json!([1, 0, 8]));
    check(&|manifest| manifest["shards"][0]["file"] = "../../history.db".into());
    check(&|manifest| manifest["shards"][0]["file"] = "grid.png".into());
    check(&|manifest| manifest["shards"][0]["end"] = serde_json::json!(1_u64 << 60));
    check(&|manifest| *manifest = serde_json::json!([]));
    // This one is cached: its header is valid.
    check(&|manifest| manifest["image"] = serde_json::json!([1, 16, 16]));
}

/// The token for changes in a run's page.
fn seal(server: &Server, cookie: &str, run: &str) -> String {
    let path = format!("/run/{run}");
    let page = request(server.port, "GET", &path, &[("cookie", cookie)], "").1;
    let page = String::from_utf8(page).unwrap();
    let seal = page.split("name=\"seal\" value=\"").nth(1);
    let seal = seal.and_then(|rest| rest.split('"').next());
    seal.expect("a seal").to_owned()
}

#[test]
fn changes_need_the_option_the_token_and_the_seal() {
    let (lab, made, server) = served(&["--write"]);
    let (first, second) = (&made.first, &made.second);
    assert_eq!(server.get("/").0, 403);
    let token = server
        .printed
        .split("?token=")
        .nth(1)
        .expect("a token in the address");
    let (status, headers, _) = answer(server.port, "GET", &format!("/?token={token}"), &[], "");
    assert!(
        status == 303 && headers.contains("httponly") && headers.contains("location: /\r\n"),
        "{headers}"
    );
    let cookie = format!("retort_token={token}");
    let seal = seal(&server, &cookie, &first.to_string());
    let seal = seal.as_str();

    let note = |seal: &str| {
        server
            .post(
                "/change/note",
                &cookie,
                &format!("seal={seal}&run={first}&note=seen"),
            )
            .0
    };
    assert_eq!(note(""), 403);
    assert_eq!(note("00"), 403);
    assert_eq!(note(seal), 303);
    assert_eq!(
        server
            .post(
                "/change/tag",
                &cookie,
                &format!("seal={seal}&run={first}&tag=good+one")
            )
            .0,
        303
    );
    assert_eq!(
        server
            .post(
                "/change/tag",
                &cookie,
                &format!("seal={seal}&run={first}&tag=latest")
            )
            .0,
        400
    );
    let shown = lab
        .retort(&["runs", "show", "good one", "--json"])
        .expect(0)
        .json();
    assert_eq!(shown["note"], "seen");
    assert_eq!(
        server
            .post(
                "/change/untag",
                &cookie,
                &format!("seal={seal}&run={first}&tag=good+one")
            )
            .0,
        303
    );

    let remove = |confirm: &str| {
        server
            .post(
                "/change/remove",
                &cookie,
                &format!("seal={seal}&run={second}&confirm={confirm}"),
            )
            .0
    };
    assert_eq!(remove(""), 400);
    assert_eq!(remove("yes"), 400);
    assert_eq!(remove(&second.0), 303);
    assert_eq!(
        lab.retort(&["runs", "list", "--json"])
            .expect(0)
            .json()
            .as_array()
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn a_run_that_is_under_way_is_not_removed() {
    let lab = Lab::new(&["a: {kind: do, act: hang}"]);
    let running = lab.start(&[]);
    lab.wait_for_worker("a");
    let server = Server::start(&lab, &["--write"]);
    let token = server.printed.split("?token=").nth(1).unwrap();
    let cookie = format!("retort_token={token}");
    let run = lab.latest().unwrap().summary.id;
    let seal = seal(&server, &cookie, &run.to_string());
    assert_eq!(
        server
            .post(
                "/change/remove",
                &cookie,
                &format!("seal={seal}&run={run}&confirm={run}")
            )
            .0,
        409
    );
    assert!(lab.latest().is_some());
    drop(running);
}

#[test]
fn several_stores_are_looked_at_together() {
    let (lab, made, _) = served(&[]);
    let other = Lab::new(&[]);
    let others = block_on(fixture::make(&other.store_dir()));
    let store = other.store_dir();
    let server = Server::start(&lab, &["--store", store.to_str().unwrap()]);
    // The lab's own store comes last.
    assert!(server.get("/").1.contains(&others.first.0));
    let second = server.get("/?store=2").1;
    assert!(second.contains(&made.first.0) && !second.contains(&others.first.0));
    assert_eq!(server.get("/?store=3").0, 404);
    // A baseline stays pinned across stores; one that no longer exists can be unpinned.
    let pinned = |place: &str| server.get(place).1.contains("class=\"pinned\"");
    for store in ["1", "2"] {
        for run in [&made.first, &others.first] {
            assert!(pinned(&format!("/?store={store}&baseline={run}")));
        }
    }
    let gone = server.get("/?baseline=gone").1;
    assert!(!pinned("/?baseline=gone") && gone.contains("data-pin=\"gone\""));
    let (status, both) = server.get(&format!(
        "/compare?run={}&run={}",
        made.first, others.second
    ));
    // Line breaks within names do not matter here.
    let both = both.replace("<wbr>", "");
    assert!(
        status == 200 && both.contains("stages.student.train.steps"),
        "{both}"
    );
    let (_, data) = server.get(&format!(
        "/curves/data.json?run={}&run={}&series=student/loss&buckets=10",
        made.first, others.first
    ));
    let data: serde_json::Value = serde_json::from_str(&data).unwrap();
    let curves = data["curves"].as_array().unwrap();
    assert_eq!(curves.len(), 2, "{data}");
    assert_eq!(curves[0]["points"].as_array().unwrap().len(), 10);
}

/// Clients that send nothing, and clients that ask for much and read nothing, more than the server keeps open.
#[test]
fn clients_that_do_nothing_keep_nobody_out() {
    let (_lab, _, server) = served(&[]);
    let asked = "GET /assets/app.js HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(200);
    for sent in ["", &asked] {
        let idle: Vec<TcpStream> = (0..300).map(|_| unread(server.port, sent)).collect();
        assert_eq!(server.get("/").0, 200);
        drop(idle);
    }
}

/// A connection with a small buffer, on which as much is sent as the server takes, and nothing is read.
fn unread(port: u16, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let small = 4096_i32;
    // SAFETY: the call reads one number.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            (&raw const small).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
    stream.set_nonblocking(true).unwrap();
    let _ = stream.write(text.as_bytes());
    stream
}
