//! The files in examples/deploy agree with the programs, and the tools that read them accept them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::http::{Watched, watched};
use crate::support::{Peer, Program, binary, installed, last_port, message, registered, skipped};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/deploy").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(file(name)).unwrap()
}

/// A folder for a test's files, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = format!("revproc-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        fs::create_dir(&folder).unwrap();
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs a program of the system to its end, which must be a good one. `false` if there is no such one.
fn accepts(program: &str, arguments: &[&str], files: &[&Path]) -> bool {
    let Some(path) = installed(program) else {
        skipped(&format!("no {program} here"));
        return false;
    };
    let mut command = Command::new(path);
    command.args(arguments).args(files);
    let mut program = Program::run(command);
    let status = program.end();
    assert!(status.success(), "{}", program.report());
    true
}

/// The dashboard's queries.
fn queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&read("grafana.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn prometheus_takes_the_rules_and_they_fire_when_they_should() {
    if accepts("promtool", &["check", "rules"], &[&file("rules.yml")]) {
        accepts("promtool", &["test", "rules"], &[&file("alerts-test.yml")]);
    }
}

#[test]
fn prometheus_takes_the_dashboards_queries() {
    let mut rules = "groups: [{name: dashboard, rules: [\n".to_owned();
    for (number, query) in queries().iter().enumerate() {
        // As Grafana fills them in.
        let query = query.replace("$__rate_interval", "1m").replace("$instance", ".*");
        // A JSON string is one of YAML, too.
        let _ = writeln!(rules, "{{record: query_{number}, expr: {}}},", Value::from(query));
    }
    rules += "]}]\n";
    let folder = Folder::new("queries");
    let path = folder.0.join("rules.yml");
    fs::write(&path, rules).unwrap();
    accepts("promtool", &["check", "rules"], &[&path]);
}

#[test]
fn every_metric_that_is_named_exists() {
    let watched = watched(&["-quiet"]);
    let _server = registered("1", "PP_1", &watched.proxy, &["-quiet"]);
    let mut client = Peer::connect(watched.proxy.1);
    client.send(message("50", "PP_1", "x"));
    assert_eq!(client.packet()["type"], 2);
    let metrics = watched.get("/metrics");
    let text = queries().join("\n") + &read("rules.yml") + &read("alerts-test.yml");
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let named = words.filter(|word| word.starts_with("revproc_") || word.starts_with("process_"));
    let named: BTreeSet<&str> = named.collect();
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        let family = name.strip_suffix("_bucket").unwrap_or(name);
        let exists = metrics.contains(&format!("\n# TYPE {family} "));
        assert!(exists, "{name} is not in\n{metrics}");
    }
}

#[test]
fn systemd_takes_the_units_and_finds_them_hardened() {
    let folder = Folder::new("units");
    let programs = binary("").display().to_string();
    // The second name is an instance of the template.
    for (unit, name) in
        [("revproc.service", "revproc.service"), ("server@.service", "server@1.service")]
    {
        let path = folder.0.join(name);
        // It wants to see the programs.
        fs::write(&path, read(unit).replace("/usr/local/bin/", &programs)).unwrap();
        if !accepts("systemd-analyze", &["verify", "--man=no", "--recursive-errors=no"], &[&path]) {
            return;
        }
        // From 0 to 100; they have 13.
        let security = ["security", "--offline=true", "--threshold=20"];
        accepts("systemd-analyze", &security, &[&path]);
    }
}

#[test]
fn the_programs_know_the_options_that_the_units_give_them() {
    let folder = Folder::new("options");
    let token = folder.0.join("token");
    fs::write(&token, "secret\n").unwrap();
    let value = |unit: &str, name: &str| {
        let text = read(unit);
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {unit}")).to_owned()
    };
    let start = |unit: &str, program: &str, changes: &[(&str, &str)]| {
        let mut line = value(unit, &format!("ExecStart=/usr/local/bin/{program} "));
        for (from, to) in [&[("%d/token", token.to_str().unwrap())], changes].concat() {
            assert!(line.contains(from), "{from} is not in {line}");
            line = line.replace(from, to);
        }
        Program::start(program, &line.split(' ').collect::<Vec<_>>())
    };
    let free = [("-port 2100", "-port 0"), ("-status 2101", "-status 0")];
    let proxy = start("revproc.service", "revproc", &free);
    let port = last_port(&proxy.line("Running the reverse proxy on port ")).to_string();
    let environment = value("server@.service", "Environment=");
    assert_eq!(environment, "POLICY=PP_1 \"PROXIES=-revproc 2100\"");
    let proxies = format!("-revproc {port}");
    let filled = [("%i", "100"), ("${POLICY}", "PP_1"), ("$PROXIES", &*proxies)];
    let _server = start("server@.service", "server", &filled);
    proxy.line("Receiving setup message from server id 100 privacy policy PP_1 port ");
}

fn up_servers(watched: &Watched, policy: &str) -> f64 {
    let series = watched.metric("revproc_up_servers");
    let labels = format!("{{policy=\"{policy}\"}}");
    series.iter().find(|(known, _)| *known == labels).expect("a series for the policy").1
}

#[test]
fn a_policy_whose_servers_have_all_left_still_says_that_none_is_up() {
    let watched = watched(&["-quiet"]);
    let mut servers = [("1", "PP_1"), ("2", "PP_1"), ("3", "PP_2")]
        .map(|(id, policy)| registered(id, policy, &watched.proxy, &["-quiet"]));
    assert_eq!((up_servers(&watched, "PP_1"), up_servers(&watched, "PP_2")), (2.0, 1.0));
    servers[1].kill();
    servers[2].kill();
    watched
        .table_when("two to leave", |_| watched.metric("revproc_registered_servers")[0].1 == 1.0);
    assert_eq!((up_servers(&watched, "PP_1"), up_servers(&watched, "PP_2")), (1.0, 0.0));
}
