//! The arguments of a command line: options with one dash or two, and what is said of wrong ones.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::builder::UnknownArgumentValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::USAGE;
use super::terminal::Terminal;

/// Parses this process's command line, in which options have one dash or two.
///
/// # Errors
///
/// The exit code, when there is nothing to run: help was asked for, or the command line is wrong,
/// which has been said.
pub fn parse<T: Parser>() -> Result<T, ExitCode> {
    let command = T::command();
    let name = command.get_name().to_owned();
    let command = match name.as_str() {
        "client" => command
            .arg(mistaken("port", "--revproc"))
            .arg(mistaken("reply-timeout", "--timeout").value_name("TIME")),
        "server" => command.arg(mistaken("port", "--listen")),
        _ => command.arg(mistaken("listen", "--port")),
    };
    let arguments = with_two_dashes(std::env::args_os(), &command);
    let parsed =
        command.try_get_matches_from(arguments).and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|mut error| {
        if is_stray_word(&error) {
            let command = if name == "server" { ", and -- in front of a command" } else { "" };
            let example = if name == "revproc" { "-port 2100" } else { "-id 5" };
            let tip = format!(
                "a value follows its option, as in {example}; put one with spaces in quotes{command}"
            );
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
        }
        let terminal = Terminal::direct("", false);
        // What one reads is what one types.
        let text = with_one_dash(&error.render().to_string());
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            text.lines().for_each(|line| terminal.line(format_args!("{line}")));
            ExitCode::SUCCESS
        } else {
            let text = text.strip_prefix("error").unwrap_or(&text);
            format!("{name}{text}").lines().for_each(|line| terminal.error_line(line));
            ExitCode::from(USAGE)
        }
    })
}

/// Whether a word stands where none is expected, which is no option either.
fn is_stray_word(error: &clap::Error) -> bool {
    let word = error.get(ContextKind::InvalidArg);
    error.kind() == ErrorKind::UnknownArgument
        && matches!(word, Some(ContextValue::String(word)) if !word.starts_with('-'))
}

/// An option that another of the programs has, and what is it called in this one.
fn mistaken(option: &'static str, meant: &'static str) -> clap::Arg {
    let parser = UnknownArgumentValueParser::suggest_arg(meant);
    clap::Arg::new(option).long(option).value_name("PORT").hide(true).value_parser(parser)
}

/// The options of a command line with two dashes. What follows an option that takes any value is none,
/// however it begins, and nothing is after `--`.
fn with_two_dashes(
    arguments: impl Iterator<Item = OsString>,
    command: &clap::Command,
) -> Vec<OsString> {
    let takes_any = |option: &str| {
        let mut known = command.get_arguments().filter(|known| known.is_allow_hyphen_values_set());
        option
            .strip_prefix("--")
            .is_some_and(|name| known.any(|known| known.get_long() == Some(name)))
    };
    let mut changed: Vec<OsString> = Vec::new();
    let (mut is_value, mut has_ended) = (false, false);
    for argument in arguments {
        let argument = if is_value || has_ended { argument } else { two_dashes(argument) };
        has_ended |= !is_value && argument == "--";
        is_value = !is_value && !has_ended && argument.to_str().is_some_and(takes_any);
        changed.push(argument);
    }
    changed
}

/// What clap says, with `-port` for `--port`; a `--` that stands alone stays.
fn with_one_dash(text: &str) -> String {
    let mut parts = text.split("--");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        shown.push_str(if part.starts_with(' ') { "--" } else { "-" });
        shown.push_str(part);
    }
    shown
}

/// `-port` as `--port`, which is how clap knows long options.
fn two_dashes(argument: OsString) -> OsString {
    match argument.to_str().and_then(|text| text.strip_prefix('-')) {
        Some(name)
            if name.len() > 1 && name.starts_with(|first: char| first.is_ascii_lowercase()) =>
        {
            format!("--{name}").into()
        }
        _ => argument,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dash_is_as_good_as_two_before_a_word() {
        let changed =
            [("-port", "--port"), ("-port=1", "--port=1"), ("-max-packet", "--max-packet")];
        for (argument, meant) in changed {
            assert_eq!(two_dashes(argument.into()), meant);
        }
        for same in ["--port", "-h", "-V", "-", "-5", "-PP", "port", "", "--"] {
            assert_eq!(two_dashes(same.into()), same);
        }
    }

    #[test]
    fn what_is_a_value_or_after_two_dashes_alone_keeps_its_dash() {
        let any = clap::Arg::new("text").long("text").allow_hyphen_values(true);
        let command = clap::Command::new("x").arg(any).arg(clap::Arg::new("port").long("port"));
        for (line, meant) in [
            ("-text -port -port -text", "--text -port --port --text"),
            ("-text=-port -port", "--text=-port --port"),
            ("-text -- -port 1 -- -port -text -port", "--text -- --port 1 -- -port -text -port"),
            ("-text -text -text", "--text -text --text"),
        ] {
            let arguments = line.split(' ').map(OsString::from);
            assert_eq!(with_two_dashes(arguments, &command).join(" ".as_ref()), meant);
        }
    }

    #[test]
    fn what_clap_says_has_one_dash_but_where_two_stand_alone() {
        let shown = with_one_dash("Usage: s [OPTIONS] --id <ID> [-- <COMMAND>...] '--x'");
        assert_eq!(shown, "Usage: s [OPTIONS] -id <ID> [-- <COMMAND>...] '-x'");
    }
}
