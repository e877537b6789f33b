//! The status page in a real browser, before a running system.

use std::io::Write;
use std::net::TcpListener;

use serde_json::json;

use crate::support::browser::Browser;
use crate::support::fake::{Fake, Manner};
use crate::support::http::watched;
use crate::support::leased::{Answer, Leased};
use crate::support::{Peer, Program, message, message_with, registered, server};

/// A port that no other program is given unasked, so that a proxy can end and come back to it.
fn own_port(nth: u16) -> u16 {
    let first = u16::try_from(std::process::id() % 9000).unwrap();
    let mut ports = (10_000 + 2 * first + nth..).step_by(2);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

fn browser() -> Option<Browser> {
    let browser = Browser::start();
    if browser.is_none() {
        // Not by eprintln, which a test that passes is not heard by.
        let _ = writeln!(std::io::stderr(), "skipped: no Chromium with its chromedriver here");
    }
    browser
}

/// An expression that is true when the server's row contains these words.
fn row(id: &str, words: &str) -> String {
    format!(
        "[...document.querySelectorAll('.servers tbody tr')]\
         .some(row => row.querySelector('th bdi').textContent === {} && row.innerText.includes({}))",
        json!(id),
        json!(words)
    )
}

fn says(words: &str) -> String {
    format!("document.body.innerText.includes({})", json!(words))
}

fn field(name: &str, text: &str) -> String {
    format!("document.querySelector('[data-f={name}]').textContent === {}", json!(text))
}

#[test]
fn the_page_follows_servers_messages_and_the_proxy_as_they_come_and_go() {
    let Some(browser) = browser() else { return };
    let ports = [own_port(0), own_port(1)].map(|port| port.to_string());
    let start = || {
        let arguments = ["-port", &ports[0], "-status", &ports[1]];
        let proxy = Program::start("revproc", &arguments);
        proxy.line("Serving the status page");
        (proxy, ports[0].parse().unwrap())
    };
    let mut proxy = start();
    browser.open(&format!("http://127.0.0.1:{}/", ports[1]));
    browser.wait(&field("state", "serving"));
    browser.wait(&says(&format!("server -id 100 -pp PP_1 -listen 2105 -revproc {}", ports[0])));

    let mut killed = registered("100", "PP_1", &proxy, &[]);
    browser.wait(&row("100", "up"));
    let _stays = registered("101", "PP_1", &proxy, &[]);
    browser.wait(&row("101", "up"));
    browser.wait(&says("2 servers take turns"));

    let mut client = Peer::connect(proxy.1);
    for number in 1..=3 {
        client.send(message("7", "PP_1", &format!("payload {number}")));
        assert_eq!(client.packet()["type"], 2);
        browser.wait(&field("messages", &number.to_string()));
        browser.wait(&says(&format!("payload {number}")));
    }
    client.send(message("7", "PP_9", "to nobody"));
    assert_eq!(client.packet()["code"], "no-server");
    browser.wait(&field("refused", "1"));
    browser.wait(&says("no-server"));
    assert_eq!(browser.errors(), Vec::<String>::new());

    killed.kill();
    browser.wait(&format!("!{}", row("100", "")));
    browser.wait(&row("101", "up"));

    proxy.0.kill();
    browser.wait(&says("Lost touch with the proxy"));
    let _again = start();
    browser.wait(&says("The proxy has restarted"));
    browser.wait(&row("101", "up"));
    browser.wait(&field("messages", "0"));
    let unexpected: Vec<_> =
        browser.errors().into_iter().filter(|error| !error.contains("net::ERR_")).collect();
    assert_eq!(unexpected, Vec::<String>::new());
}

#[test]
fn hostile_names_and_payloads_stay_text() {
    const HOSTILE: &str =
        "<img src=x onerror=\"hacked=1\"><script>hacked=1</script>'\"\u{202e}&lt;";
    let Some(browser) = browser() else { return };
    let watched = watched(&[]);
    let _server = server(HOSTILE, HOSTILE, watched.proxy.1, &[]);
    watched.table_when("the server", |table| table["policies"][0]["policy"] == HOSTILE);
    let mut client = Peer::connect(watched.proxy.1);
    let packet = json!({"type": 0, "srcid": HOSTILE, "privPoliId": HOSTILE, "payload": HOSTILE});
    client.send(packet.to_string());
    assert_eq!(client.packet()["type"], 2);
    browser.open(&format!("http://127.0.0.1:{}/", watched.status));
    browser.wait(&says("✓ ack"));
    for place in
        ["h2 bdi", ".servers th bdi", ".latest [data-f=policy]", ".latest [data-f=payload]"]
    {
        let text = browser.run(&format!("return document.querySelector('{place}').textContent"));
        let text = text.as_str().unwrap();
        assert!(text.starts_with("<img src=x onerror=\"hacked=1\"><script>"), "{place}: {text:?}");
        assert!(!text.contains('\u{202e}'), "{place}: {text:?}");
    }
    assert_eq!(browser.run("return document.querySelectorAll('img, script').length"), 1);
    assert_eq!(browser.run("return typeof hacked"), "undefined");
    assert_eq!(browser.errors(), Vec::<String>::new());
}

#[test]
fn a_server_that_is_draining_is_shown_beside_the_rotation() {
    let Some(browser) = browser() else { return };
    // The message must stay in flight until the page has shown it, however slow the browser is.
    let watched = watched(&["-reply-timeout", "2m", "-message-timeout", "2m"]);
    // On a busy machine a server of ours may not get to renew its lease.
    let _stays = Fake::leased("1", "P", watched.proxy.1, Manner::Good);
    let slow = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = slow.local_addr().unwrap().port();
    let setup =
        json!({"type": 1, "id": "leaves", "privPolyId": "P", "listenport": port, "lease": 60});
    let mut lease = Peer::connect(watched.proxy.1);
    lease.send(setup.to_string());
    assert_eq!(lease.packet()["lease"], 60);
    browser.open(&format!("http://127.0.0.1:{}/", watched.status));
    browser.wait(&says("2 servers take turns"));
    let mut clients = [Peer::connect(watched.proxy.1), Peer::connect(watched.proxy.1)];
    for client in &mut clients {
        client.send(message("7", "P", "x"));
    }
    let (in_flight, _) = slow.accept().unwrap();
    watched.table_when("the other message's ack", |table| table["totals"]["acks"] == 1);
    drop(lease);
    browser.wait(&row("leaves", "draining"));
    browser.wait(&says("One server: every message goes to it."));
    drop(in_flight);
    assert_eq!(browser.errors(), Vec::<String>::new());
}

#[test]
fn a_phone_shows_a_server_in_a_few_lines_and_all_data_is_linked() {
    let Some(browser) = browser() else { return };
    let watched = watched(&[]);
    let _servers = ["100", "101"].map(|id| registered(id, "PP_1", &watched.proxy, &[]));
    let mut client = Peer::connect(watched.proxy.1);
    for _ in 0..2 {
        client.send(message("7", "PP_1", "hello"));
        assert_eq!(client.packet()["type"], 2);
    }
    let page = format!("http://127.0.0.1:{}/", watched.status);
    browser.open(&page);
    browser.wait(&row("101", "renewed"));
    let peak = "document.querySelector('[data-f=peak]').textContent";
    browser.wait(&format!("/^at most [\\d.]+ messages a second in the last minute$/.test({peak})"));

    let heights =
        "return [...document.querySelectorAll('.servers tbody tr')].map(row => row.offsetHeight)";
    browser.resize(800);
    let tall = browser.run(heights);
    browser.resize(390);
    let low = browser.run(heights);
    for (tall, low) in tall.as_array().unwrap().iter().zip(low.as_array().unwrap()) {
        assert!(low.as_u64().unwrap() * 2 < tall.as_u64().unwrap(), "{tall} and {low} pixels");
    }
    for width in [390, 320] {
        browser.resize(width);
        browser.wait("document.documentElement.scrollWidth <= innerWidth");
    }
    // A line does not end between a number and its unit, which this space keeps together.
    let text = browser.run("return document.querySelector('.servers').textContent");
    let text = text.as_str().unwrap();
    assert!(text.contains("3\u{a0}s lease, held "), "{text}");
    assert!([" s", " ms", " min"].iter().all(|unit| !text.contains(&format!("0{unit}"))), "{text}");
    for (document, words) in [("metrics", "# HELP revproc_"), ("table.json", "\"policies\"")] {
        browser.open(&page);
        browser.run(&format!("document.querySelector('footer a[href={document:?}]').click()"));
        browser.wait(&says(words));
    }
}

#[test]
fn a_servers_places_and_those_who_wait_for_one_are_shown() {
    let Some(browser) = browser() else { return };
    let watched = watched(&[]);
    let _server = Leased::with_capacity("1", "P", watched.proxy.1, 2, |_| Answer::Skip);
    browser.open(&format!("http://127.0.0.1:{}/", watched.status));
    browser.wait(&row("1", "0 of 2 in use"));
    let mut client = Peer::connect(watched.proxy.1);
    client.send(message_with("7", "P", "x", "\"timeout\": 600").repeat(2));
    browser.wait(&row("1", "2 of 2 in use"));
    assert_eq!(browser.run("return document.querySelector('[data-f=waiting]').hidden"), true);
    client.send(message_with("7", "P", "x", "\"timeout\": 600").repeat(3));
    browser.wait(&says("3 messages wait for a server."));
    assert_eq!(browser.errors(), Vec::<String>::new());
}
