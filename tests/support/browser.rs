//! A real browser, driven by WebDriver over plain HTTP.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use super::http::Http;
use super::{Program, installed, last_port};

/// The browser's arguments; they keep it off the network.
const ARGUMENTS: [&str; 8] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/// The bound on a wait for the browser, which starts slowly on a busy machine.
const BROWSER_BOUND: Duration = Duration::from_secs(60);

/// One browser at a time: several would compete for the CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A headless Chromium with one tab, killed when dropped.
pub struct Browser {
    driver: Program,
    port: u16,
    session: String,
    profile: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Browser {
    /// Starts a browser; `None` if none is installed.
    pub fn start() -> Option<Self> {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let chromium = names.into_iter().find_map(installed)?;
        let chromedriver = installed("chromedriver")?;
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // All its files are in a folder that is removed at the end.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let folder = format!("revproc-browser-{}-{number}", std::process::id());
        let profile = std::env::temp_dir().join(folder);
        std::fs::create_dir(&profile).expect("a folder that nobody else has");
        let (driver, port) = loop {
            let mut command = Command::new(&chromedriver);
            command.arg("--port=0").env("TMPDIR", &profile).process_group(0);
            let driver = Program::run(command);
            // It picks a port that is free for IPv6 and takes it for IPv4 too, which may fail.
            let lines = ["started successfully on port ", "IPv4 port not available"];
            let line = driver.wait(lines[0], |out, _| {
                out.iter().find(|line| lines.iter().any(|text| line.contains(text))).cloned()
            });
            if line.contains(lines[0]) {
                break (driver, last_port(line.trim_end_matches('.')));
            }
        };
        let session = String::new();
        let mut browser = Browser { driver, port, session, profile, _turn: turn };
        let mut arguments = ARGUMENTS.map(str::to_owned).to_vec();
        arguments.push(format!("--user-data-dir={}", browser.profile.join("profile").display()));
        let capabilities = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let session = browser.call("POST", "/session", &capabilities);
        browser.session = format!("/session/{}", session["sessionId"].as_str().expect("an id"));
        Some(browser)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if method == "POST" { body.to_string() } else { String::new() };
        let answer = Http::connect(self.port).request(method, path, "", &body);
        let mut value: Value = serde_json::from_str(&answer.body).expect("WebDriver speaks JSON");
        assert_eq!(answer.status, 200, "{path}: {}", value["value"]["message"]);
        value["value"].take()
    }

    /// Opens a page and waits until it has loaded.
    pub fn open(&self, url: &str) {
        self.call("POST", &format!("{}/url", self.session), &json!({"url": url}));
    }

    /// Makes the window this wide, in pixels.
    pub fn resize(&self, width: u32) {
        let size = json!({"width": width, "height": 800});
        self.call("POST", &format!("{}/window/rect", self.session), &size);
        self.wait(&format!("innerWidth === {width}"));
    }

    /// Runs a script, the body of a function, in the page and returns its result.
    pub fn run(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []});
        self.call("POST", &format!("{}/execute/sync", self.session), &body)
    }

    /// Returns the page's visible text.
    pub fn text(&self) -> String {
        self.run("return document.body.innerText").as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression is true in the page.
    pub fn wait(&self, expression: &str) {
        let end = Instant::now() + BROWSER_BOUND;
        while self.run(&format!("return !!({expression})")) != true {
            assert!(Instant::now() < end, "waited in vain for {expression}:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns the errors in the page's console since the last call.
    pub fn errors(&self) -> Vec<String> {
        let log =
            self.call("POST", &format!("{}/se/log", self.session), &json!({"type": "browser"}));
        let severe = log.as_array().into_iter().flatten().filter(|line| line["level"] == "SEVERE");
        severe.map(|line| line["message"].to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A killed driver leaves its browser running, so kill their process group.
        let group = i32::try_from(self.driver.pid()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        self.driver.kill();
        let end = Instant::now() + BROWSER_BOUND;
        // A child process may still be writing there.
        while std::fs::remove_dir_all(&self.profile).is_err()
            && self.profile.exists()
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
