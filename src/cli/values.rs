//! The values of options: ports, addresses, times, sizes, counts.

use std::str::FromStr;
use std::time::Duration;

use crate::net::endpoint::{Endpoint, LOOPBACK};
use crate::protocol::MAX_ID;

/// The most of anything that is counted.
const MAX_COUNT: usize = 1_000_000;

/// A port to listen on; 0 is any free one.
///
/// # Errors
///
/// What a port is.
pub fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            format!("give the port alone, {port}, and the address with -host {host}")
        }
        _ => "a port is a number from 1 to 65535, or 0 for any free one".to_owned(),
    })
}

/// An id or a policy.
///
/// # Errors
///
/// That it is empty, as where a shell's variable is.
pub fn name(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("it is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// An address to listen on, or a name; an IPv6 address with its brackets or without.
///
/// # Errors
///
/// That it is empty.
pub fn host(text: &str) -> Result<String, String> {
    name(text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text))
}

/// Where to listen: a port, which may be 0, on the loopback address unless a host is given.
///
/// # Errors
///
/// How it is written.
pub fn listen_endpoint(text: &str) -> Result<Endpoint, String> {
    match text.strip_suffix(":0").or((text == "0").then_some(LOOPBACK)) {
        Some(host) => Ok(Endpoint { port: 0, ..format!("{host}:1").parse()? }),
        None => text.parse(),
    }
}

/// A length of time: `5` or `2.5` seconds, `300ms`, `5s`, `2m`.
///
/// # Errors
///
/// How it is written.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let seconds = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        _ => f64::NAN,
    };
    number
        .parse::<f64>()
        .ok()
        .and_then(|number| Duration::try_from_secs_f64(number * seconds).ok())
        .filter(|length| *length <= Duration::from_secs(86_400))
        .ok_or_else(|| "give seconds such as 5 or 2.5, or 300ms, or 2m; a day at most".to_owned())
}

/// As [`duration`], but not nothing.
///
/// # Errors
///
/// How it is written.
pub fn timeout(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        length if length >= Duration::from_millis(1) => Ok(length),
        _ => Err("a timeout must be at least 1ms".to_owned()),
    }
}

/// A message's time, as a packet has it: whole seconds, at least 1.
///
/// # Errors
///
/// How it is written.
pub fn whole_seconds(text: &str) -> Result<u64, String> {
    let length = duration(text)?;
    match length.as_secs() {
        seconds @ 1.. if length.subsec_nanos() == 0 => Ok(seconds),
        _ => Err("give whole seconds, from 1, such as 20 or 2m".to_owned()),
    }
}

/// A message's number by its sender.
///
/// # Errors
///
/// That it is empty or too long.
pub fn id(text: &str) -> Result<String, String> {
    if text.len() > MAX_ID {
        return Err(format!("it has {} bytes; {MAX_ID} are allowed", text.len()));
    }
    name(text)
}

/// A size in bytes: `65536`, `64K` or `64KiB`, `4M` or `4MiB`, `1G`.
///
/// # Errors
///
/// How it is written.
pub fn size(text: &str) -> Result<usize, String> {
    bytes(text)
        .filter(|bytes| (256..=1 << 30).contains(bytes))
        .ok_or_else(|| "give bytes such as 65536, or 64K, or 4M; from 256 bytes to 1G".to_owned())
}

/// As [`size`], but as large as one likes.
///
/// # Errors
///
/// How it is written.
pub fn memory(text: &str) -> Result<usize, String> {
    bytes(text).ok_or_else(|| "give bytes such as 268435456, or 256M, or 4G".to_owned())
}

fn bytes(text: &str) -> Option<usize> {
    let (number, unit) = split_unit(text);
    let shift = match unit {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// A number of things of which there must be at least one.
///
/// # Errors
///
/// What it is.
pub fn count(text: &str) -> Result<usize, String> {
    usize::from_str(text)
        .ok()
        .filter(|count| (1..=MAX_COUNT).contains(count))
        .ok_or_else(|| format!("give a whole number from 1 to {MAX_COUNT}"))
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_go_from_0_to_65535() {
        assert_eq!(port("0"), Ok(0));
        assert_eq!(port("65535"), Ok(65535));
        for wrong in ["", "65536", "-1", "http", "1.0", " 1", ":1", "host:port"] {
            assert!(port(wrong).unwrap_err().contains("from 1 to 65535"), "{wrong}");
        }
        let expected = "give the port alone, 2106, and the address with -host [::1]";
        assert_eq!(port("[::1]:2106").unwrap_err(), expected);
    }

    #[test]
    fn lengths_of_time_are_seconds_unless_they_have_a_unit() {
        for (text, milliseconds) in [
            ("0", 0),
            ("5", 5000),
            ("2.5", 2500),
            ("5s", 5000),
            ("300ms", 300),
            ("2m", 120_000),
            ("86400", 86_400_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for wrong in
            ["", "s", "-1", "1h", "5 s", "1e3", "inf", "86401", "1.2.3", "9".repeat(400).as_str()]
        {
            assert!(duration(wrong).unwrap_err().starts_with("give seconds"), "{wrong}");
        }
    }

    #[test]
    fn a_timeout_is_not_nothing() {
        assert_eq!(timeout("1ms"), Ok(Duration::from_millis(1)));
        for wrong in ["0", "0ms", "0.0001"] {
            assert_eq!(timeout(wrong).unwrap_err(), "a timeout must be at least 1ms");
        }
        assert!(timeout("soon").unwrap_err().starts_with("give seconds"));
    }

    #[test]
    fn a_messages_time_is_whole_seconds() {
        for (text, seconds) in [("1", 1), ("2.0", 2), ("3000ms", 3), ("2m", 120)] {
            assert_eq!(whole_seconds(text), Ok(seconds), "{text}");
        }
        for wrong in ["0", "1.5", "300ms", "0.0"] {
            let expected = "give whole seconds, from 1, such as 20 or 2m";
            assert_eq!(whole_seconds(wrong).unwrap_err(), expected, "{wrong}");
        }
        assert!(whole_seconds("soon").unwrap_err().starts_with("give seconds"));
    }

    #[test]
    fn sizes_are_bytes_unless_they_have_a_unit() {
        for (text, bytes) in [
            ("256", 256),
            ("65536B", 65536),
            ("64K", 65536),
            ("64KiB", 65536),
            ("4M", 4 << 20),
            ("4MiB", 4 << 20),
            ("1G", 1 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for wrong in
            ["", "K", "255", "2G", "4T", "1.5M", "-1", "99999999999999999999", "17179869185G"]
        {
            assert!(size(wrong).unwrap_err().starts_with("give bytes"), "{wrong}");
            assert_eq!(
                memory(wrong).is_err(),
                size(wrong).is_err() && !["255", "2G"].contains(&wrong)
            );
        }
    }

    #[test]
    fn counts_begin_with_1() {
        assert_eq!(count("1"), Ok(1));
        assert_eq!(count("1000000"), Ok(1_000_000));
        for wrong in ["0", "-1", "1000001", "1.5", "", "many"] {
            let expected = "give a whole number from 1 to 1000000";
            assert_eq!(count(wrong).unwrap_err(), expected, "{wrong}");
        }
    }
}
