//! The example of two proxies behind a balancer.

use std::process::Command;

use crate::support::{binary, installed, skipped};

#[test]
fn behind_haproxy_nothing_is_lost_when_proxies_and_servers_are_killed_or_stop() {
    if let Some(missing) = ["haproxy", "openssl"].into_iter().find(|name| installed(name).is_none())
    {
        return skipped(&format!("no {missing} here"));
    }
    let programs = binary("");
    let is_built = programs.join("examples/load").exists();
    assert!(is_built, "cargo test builds it, but not with --test: cargo build --example load");
    // It bounds its own time.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/cluster.sh");
    let output = Command::new(script).args(["-s", "3", "-b"]).arg(programs).output().unwrap();
    let [out, err] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let report = format!("{}\n{out}{err}", output.status);
    assert!(output.status.success() && out.ends_with("\nlost 0\n") && err.is_empty(), "{report}");
    // Each event's line: sent, acked, sent again, lost; and without -wait: sent, lost.
    let rows: Vec<Vec<u64>> = out
        .lines()
        .map(|line| line.split_whitespace().rev().map_while(|word| word.parse().ok()).collect())
        .filter(|numbers: &Vec<u64>| numbers.len() == 6)
        .collect();
    assert_eq!(rows.len(), 4, "{report}");
    for row in &rows {
        let [lost_without, sent_without, lost, _, acked, sent] = row[..] else { unreachable!() };
        assert!(sent > 0 && acked == sent && lost == 0, "{report}");
        // A connection loses what is on it once.
        assert!(sent_without > 0 && lost_without <= 8, "{report}");
    }
    // A server that is killed, and a proxy that comes back, are nobody's loss.
    assert!(rows[1][0] == 0 && rows[2][0] == 0, "{report}");
    let shares = out.lines().find(|line| line.starts_with("acked ")).expect("the shares");
    let mut shares = shares.split(' ').filter_map(|word| word.trim_end_matches(',').parse().ok());
    assert!(shares.all(|share: u64| share > 0), "{report}");
}
