//! A real browser, driven through its WebDriver over plain HTTP.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use super::http::Http;
use super::{Program, last_port};

/// What it is started with: nothing that asks the network for anything.
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

/// How long a page may take for anything: a browser is slow to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Several at once would only take the processors from one another.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A headless Chromium with one tab, ended when dropped.
pub struct Browser {
    driver: Program,
    port: u16,
    session: String,
    profile: PathBuf,
    _only: MutexGuard<'static, ()>,
}

impl Browser {
    /// Starts a browser; `None` where none is installed.
    pub fn start() -> Option<Self> {
        let chromium = find(&["chromium", "chromium-browser", "google-chrome"])?;
        let chromedriver = find(&["chromedriver"])?;
        let only = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // Whatever it writes goes where it is removed in the end.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let nth = STARTED.fetch_add(1, Ordering::Relaxed);
        let folder = format!("revproc-browser-{}-{nth}", std::process::id());
        let profile = std::env::temp_dir().join(folder);
        std::fs::create_dir(&profile).expect("a folder that nobody else has");
        let (driver, port) = loop {
            let mut command = Command::new(&chromedriver);
            command.arg("--port=0").env("TMPDIR", &profile).process_group(0);
            let driver = Program::run(command);
            // It finds a free port for IPv6 and takes it for IPv4, too, where it may not be free.
            let lines = ["started successfully on port ", "IPv4 port not available"];
            let line = driver.wait(lines[0], |out, _| {
                out.iter().find(|line| lines.iter().any(|text| line.contains(text))).cloned()
            });
            if line.contains(lines[0]) {
                break (driver, last_port(line.trim_end_matches('.')));
            }
        };
        let session = String::new();
        let mut browser = Browser { driver, port, session, profile, _only: only };
        let mut arguments = ARGUMENTS.map(str::to_owned).to_vec();
        arguments.push(format!("--user-data-dir={}", browser.profile.join("profile").display()));
        let asked = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let made = browser.call("POST", "/session", &asked);
        browser.session = format!("/session/{}", made["sessionId"].as_str().expect("an id"));
        Some(browser)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if method == "POST" { body.to_string() } else { String::new() };
        let answer = Http::connect(self.port).request(method, path, "", &body);
        let mut value: Value = serde_json::from_str(&answer.body).expect("WebDriver speaks JSON");
        assert_eq!(answer.status, 200, "{path}: {}", value["value"]["message"]);
        value["value"].take()
    }

    /// Opens a page and waits until it is loaded.
    pub fn open(&self, url: &str) {
        self.call("POST", &format!("{}/url", self.session), &json!({"url": url}));
    }

    /// Runs the body of a function in the page.
    pub fn run(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []});
        self.call("POST", &format!("{}/execute/sync", self.session), &body)
    }

    /// The page's text as it is seen.
    pub fn text(&self) -> String {
        self.run("return document.body.innerText").as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression is true in the page.
    pub fn wait(&self, expression: &str) {
        let end = Instant::now() + PATIENCE;
        while self.run(&format!("return !!({expression})")) != true {
            assert!(Instant::now() < end, "waited in vain for {expression}:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The errors that the page's console has seen since this was last asked.
    pub fn errors(&self) -> Vec<String> {
        let log =
            self.call("POST", &format!("{}/se/log", self.session), &json!({"type": "browser"}));
        let severe = log.as_array().into_iter().flatten().filter(|line| line["level"] == "SEVERE");
        severe.map(|line| line["message"].to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver leaves its browser behind when it is killed, but both are of one group.
        let group = i32::try_from(self.driver.pid()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        self.driver.kill();
        let end = Instant::now() + PATIENCE;
        // Its last child may still be writing there.
        while std::fs::remove_dir_all(&self.profile).is_err()
            && self.profile.exists()
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn find(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let places: Vec<_> = std::env::split_paths(&path).collect();
    let all = names.iter().flat_map(|name| places.iter().map(move |place| place.join(name)));
    all.into_iter().find(|file: &PathBuf| Path::is_file(file))
}
