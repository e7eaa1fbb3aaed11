//! Choices persist from page to page: the baseline, how curves are drawn, which run a link means. Changes from a browser are
//! applied.

use std::process::Stdio;

use retort_tests::program::script;

use super::browser::{Browser, answer};
use super::lab::{Lab, block_on};
use super::serving::Server;
use super::{fixture, open};

#[test]
fn a_run_is_tagged_noted_and_removed_in_a_browser() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let lab = Lab::new(&[]);
    let made = block_on(fixture::make(&lab.store_dir()));
    let server = Server::start(&lab, &["--write"]);
    browser.open(&server.printed);
    browser.wait_until("document.querySelectorAll('tr[data-run]').length === 3");
    assert!(
        !browser.address().contains("token"),
        "{}",
        browser.address()
    );
    browser.open(&server.at(&format!("/run/{}", made.second)));
    browser.click("details.change summary");
    browser.enter("#tag", "<b>best</b>");
    browser.click("form[action='/change/tag'] button");
    browser.wait_until("document.querySelector('.run-head .tag')?.textContent === '<b>best</b>'");
    browser.click("details.change summary");
    browser.enter("#note", "keep \"this\" & that");
    browser.click("form[action='/change/note'] button");
    browser.wait_until(
        "document.querySelector('.run-head .note')?.textContent === 'keep \"this\" & that'",
    );
    browser.click("details.change summary");
    browser.keep("changes");
    browser.click("form[action='/change/untag'] button");
    browser.wait_until("!document.querySelector('.run-head .tag')");
    browser.expect_sound();
    browser.click("details.change summary");
    browser.click("a.danger");
    browser.enter("#confirm", "yes");
    browser.click("button.danger");
    browser.wait_for_text("its whole id has to be typed");
    browser.forgive();
    browser.back();
    browser.enter("#confirm", &made.second.0);
    browser.keep("remove");
    browser.click("button.danger");
    browser.wait_until("document.querySelectorAll('tr[data-run]').length === 2");
    browser.expect_sound();
}

#[test]
fn curves_are_drawn_as_before_when_others_are_chosen() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at(&format!(
        "/curves?baseline={}&run={}&series=student/loss",
        made.second, made.first
    )));
    browser.wait_for("figure.chart svg .line");
    browser.click("[data-knob=logy]");
    browser.click("[data-knob=band]");
    browser.click("[data-knob=axis][data-value=time]");
    browser.script("const knob = document.querySelector('[data-knob=smooth]'); knob.value = 0.5; knob.dispatchEvent(new Event('input', {bubbles: true}))");
    browser.wait_until("location.search.includes('smooth=0.5')");
    browser.click("#series-choices li:nth-child(2) input");
    browser.click("#choice button.primary");
    browser.wait_until("document.querySelectorAll('figure.chart').length === 2");
    let address = browser.address();
    for part in ["logy=1", "band=0", "axis=time", "smooth=0.5"] {
        assert_eq!(address.matches(part).count(), 1, "{part} in {address}");
    }
    assert_eq!(address.matches(&made.second.0).count(), 1, "{address}");
    assert!(
        address.contains(&format!("baseline={}", made.second)),
        "{address}"
    );
    browser.wait_until("document.querySelector('[data-knob=logy]').checked && document.querySelectorAll('.plot .raw').length >= 2");
    // The removed run is gone.
    browser.click("[data-knob=logy]");
    browser.click("#choice button.primary");
    browser
        .wait_until("!location.search.includes('logy') && location.search.includes('axis=time')");
    browser.expect_sound();
}

#[test]
fn a_baseline_goes_along_to_every_page() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    let pair = format!("baseline={}&run={}", made.first, made.second);
    browser.open(&server.at(&format!("/compare?{pair}")));
    browser.wait_until("document.querySelector('thead .badge')?.textContent === 'baseline'");
    for (keys, page) in [("gc", "curves"), ("gp", "pictures"), ("gv", "compare")] {
        browser.keys(keys);
        browser.wait_until(&format!("location.pathname === '/{page}'"));
        assert!(browser.address().ends_with(&pair), "{}", browser.address());
    }
    browser.wait_until("document.querySelector('.delta')");
    // A run is compared with the baseline from another page.
    browser.open(&server.at(&format!("/run/{}", made.first)));
    browser.click("#pin");
    browser.wait_until("document.querySelector('#pin').getAttribute('aria-pressed') === 'true'");
    browser.open(&server.at(&format!("/run/{}", made.second)));
    browser.wait_until("document.querySelector('.actions a[href*=baseline]')");
    browser.click(".actions a[href*=baseline]");
    browser.wait_until("document.querySelectorAll('.delta').length > 0");
    assert!(
        browser
            .address()
            .contains(&format!("baseline={}", made.first)),
        "{}",
        browser.address()
    );
    browser.expect_sound();
}

#[test]
fn keys_act_after_a_click_beside_everything() {
    let Some((_lab, made, server, browser)) = open() else {
        return;
    };
    browser.open(&server.at("/"));
    browser.wait_for("table.runs");
    browser.keys("jj");
    browser.click("#where-help");
    browser.wait_until("document.activeElement.id === 'main'");
    browser.keys("\u{e007}");
    browser.wait_until(&format!("location.pathname === '/run/{}'", made.second));
    browser.expect_sound();
}

#[test]
fn many_tabs_can_be_open() {
    let Some((_lab, _, server, browser)) = open() else {
        return;
    };
    // More tabs than a browser's connections to one server. Here every tab counts as visible, so the test hides them.
    for number in 0..8 {
        if number > 0 {
            browser.tab();
        }
        browser.open(&server.at("/"));
        browser.wait_until("document.querySelectorAll('tr[data-run]').length === 3");
        browser.wait_until("document.querySelector('#pulse.on')");
        if number < 7 {
            browser.script(
                "Object.defineProperty(document, 'hidden', {value: true, configurable: true}); \
                 document.dispatchEvent(new Event('visibilitychange'))",
            );
            browser.wait_until("!document.querySelector('#pulse.on')");
        }
    }
    // A tab that becomes visible gets events again.
    browser.script(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true}); \
         document.dispatchEvent(new Event('visibilitychange')); delete document.hidden; \
         document.dispatchEvent(new Event('visibilitychange'))",
    );
    browser.wait_until("document.querySelector('#pulse.on')");
    browser.expect_sound();
}

#[test]
fn a_link_means_the_same_run_tomorrow() {
    let lab = Lab::new(&[]);
    let made = block_on(fixture::make(&lab.store_dir()));
    let server = Server::start(&lab, &[]);
    let (first, second) = (&made.first, &made.second);
    let settled = |path: &str, expected: &str| {
        let (status, headers, _) = answer(server.port, "GET", path, &[], "");
        assert!(
            status == 303 && headers.contains(&format!("location: {expected}\r\n")),
            "{path}: {status} {headers}"
        );
        assert_eq!(server.get(expected).0, 200, "{expected}");
    };
    settled("/run/latest~1", &format!("/run/{second}"));
    settled(
        "/run/baseline/log?level=warn",
        &format!("/run/{first}/log?level=warn"),
    );
    settled(
        "/compare?run=latest~1&run=baseline",
        &format!("/compare?run={second}&run={first}"),
    );
    settled(
        "/curves?run=latest~1&logy=1",
        &format!("/curves?run={second}&logy=1"),
    );
    settled(
        "/pictures?class=3&run=baseline",
        &format!("/pictures?class=3&run={first}"),
    );
    // A baseline that no longer exists is ignored.
    settled(
        &format!("/compare?baseline=gone&run={second}"),
        &format!("/compare?run={second}"),
    );
    assert_eq!(server.get("/compare?run=gone").0, 404);
    assert_eq!(server.get(&format!("/run/{first}")).0, 200);
}

#[test]
fn who_asks_for_a_browser_is_told_that_there_is_none() {
    let lab = Lab::new(&[]);
    block_on(fixture::make(&lab.store_dir()));
    let bin = lab.dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let program = |name: &str, text: &str| {
        let path = bin.join(name);
        script(&path, &format!("#!/bin/sh\n{text}\n"));
        path
    };
    // The text until the first event.
    let until = |browser: &str, word: &str| {
        let mut child = lab
            .command(&["ui", "--port", "0", "--open"])
            .env("PATH", &bin)
            .env("BROWSER", browser)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
        let found = lines.map_while(Result::ok).find(|line| line.contains(word));
        child.kill().unwrap();
        child.wait().unwrap();
        found.unwrap()
    };
    until("", "no browser could be opened (xdg-open:");
    // Without a desktop, the configured browser.
    let opened = bin.join("opened");
    let named = program(
        "named",
        &format!("echo \"$1\" > '{}'; exit 7", opened.display()),
    );
    until(named.to_str().unwrap(), "named: exit status: 7");
    let address = std::fs::read_to_string(&opened).unwrap();
    assert!(address.starts_with("http://localhost:"), "{address}");
    program("xdg-open", "exit 3");
    until("", "xdg-open: exit status: 3");
}
