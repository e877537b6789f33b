//! What the checker says: a line for each case, and for each failure what a student needs to know.

use std::io::{IsTerminal, Write};

use revproc::cli::terminal::Terminal;
use serde_json::{Value, json};

use crate::cases::{Case, Rank, SECTIONS};
use crate::run::{Done, Outcome};
use crate::start::Broken;

/// How long lines may be.
const WIDTH: usize = 100;

/// Where what belongs to a case begins.
const INDENT: &str = "          ";

/// Says how cases ended, in the order of their numbers.
pub struct Report<'a> {
    cases: &'a [&'static Case],
    done: Vec<Option<Done>>,
    /// The cases that were said.
    said: usize,
    verbose: bool,
    /// Nothing but the result is wanted.
    quiet: bool,
    terminal: Terminal,
}

impl<'a> Report<'a> {
    /// Begins a report.
    pub fn new(cases: &'a [&'static Case], terminal: &Terminal, verbose: bool, json: bool) -> Self {
        let done = cases.iter().map(|_| None).collect();
        Report { cases, done, said: 0, verbose, quiet: json, terminal: terminal.clone() }
    }

    /// Takes what came of a case, and says what can be said by now.
    pub fn add(&mut self, done: Done) {
        let place = done.place;
        self.done[place] = Some(done);
        self.say();
        self.progress();
    }

    /// Says the rest. The cases that are missing did not end in time, or not at all for what has
    /// hindered the checker.
    pub fn finish(&mut self, hindrance: Option<String>) {
        let outcome = match hindrance {
            Some(why) => Outcome::Hindered(why),
            None => Outcome::Skipped("no time was left".to_owned()),
        };
        for place in 0..self.cases.len() {
            self.done[place].get_or_insert_with(|| Done {
                place,
                outcome: outcome.clone(),
                words: Vec::new(),
                notes: Vec::new(),
            });
        }
        self.say();
    }

    /// Returns whether all required cases passed, of which there may be none.
    pub fn is_passed(&self) -> bool {
        let is_missing = |(case, done): (&&Case, &Option<Done>)| {
            case.rank == Rank::Required
                && !matches!(done, Some(Done { outcome: Outcome::Pass, .. }))
        };
        !self.cases.iter().zip(&self.done).any(is_missing)
    }

    /// Returns whether the checker could not do its work in some case.
    pub fn is_hindered(&self) -> bool {
        self.done.iter().flatten().any(|done| matches!(done.outcome, Outcome::Hindered(_)))
    }

    fn say(&mut self) {
        while let Some(done) = self.done.get(self.said).and_then(Option::as_ref) {
            let case = self.cases[self.said];
            if !self.quiet {
                self.clear_progress();
                let before = self.said.checked_sub(1).map(|before| self.cases[before].section());
                if before != Some(case.section()) {
                    let section = case.section();
                    self.terminal.line(format_args!("{section}   {}", SECTIONS[section - 1]));
                }
                self.say_case(case, done);
            }
            self.said += 1;
        }
    }

    fn say_case(&self, case: &Case, done: &Done) {
        let line = |word: &str, rest: &str| {
            self.terminal.line(format_args!("{word} {:<5}{}{rest}", case.number, case.title));
        };
        match &done.outcome {
            Outcome::Pass => line("pass", ""),
            Outcome::Skipped(why) | Outcome::Hindered(why) => line("skip", &format!(" ({why})")),
            Outcome::Fail(failure) => {
                match case.rank {
                    Rank::Required => line("FAIL", ""),
                    Rank::Recommended => line("FAIL", " (recommended)"),
                    Rank::Hint => line("hint", ""),
                }
                self.part("sent", case.sent);
                self.part("expected", case.expected);
                self.part("came", &failure.came);
                self.part("look", failure.why.as_deref().unwrap_or(case.why));
                done.words.iter().for_each(|words| self.part("note", words));
            }
        }
        if self.verbose {
            for note in &done.notes {
                self.terminal.line(format_args!("{INDENT}. {note}"));
            }
        }
    }

    fn part(&self, name: &str, text: &str) {
        let mut line = format!("{INDENT}{name:<9}");
        for word in text.split_whitespace() {
            if line.chars().count() + word.chars().count() >= WIDTH
                && line.trim_start().contains(' ')
            {
                self.terminal.line(format_args!("{}", line.trim_end()));
                line = format!("{INDENT}{:<9}", "");
            }
            line.push_str(word);
            line.push(' ');
        }
        self.terminal.line(format_args!("{}", line.trim_end()));
    }

    /// Counts passes, failures, hints and skipped cases.
    fn counts(&self) -> [usize; 4] {
        let mut counts = [0; 4];
        for (case, done) in self.cases.iter().zip(&self.done) {
            let Some(done) = done else { continue };
            let which = match (&done.outcome, case.rank) {
                (Outcome::Pass, _) => 0,
                (Outcome::Fail(_), Rank::Hint) => 2,
                (Outcome::Fail(_), _) => 1,
                (Outcome::Skipped(_) | Outcome::Hindered(_), _) => 3,
            };
            counts[which] += 1;
        }
        counts
    }

    /// Says the last line.
    pub fn summary(&self) {
        let [pass, fail, hints, skipped] = self.counts();
        let failed = |rank| {
            let is_failed = |(case, done): &(&&Case, &Option<Done>)| {
                let failed = matches!(done, Some(Done { outcome: Outcome::Fail(_), .. }));
                case.rank == rank && failed
            };
            self.cases.iter().zip(&self.done).filter(is_failed).count()
        };
        let mut line = format!("{pass} pass, {fail} fail");
        if fail > 0 {
            let (required, recommended) = (failed(Rank::Required), failed(Rank::Recommended));
            line.push_str(&format!(" ({required} required, {recommended} recommended)"));
        }
        if hints > 0 {
            line.push_str(&format!(", {hints} hint{}", if hints == 1 { "" } else { "s" }));
        }
        if skipped > 0 {
            line.push_str(&format!(", {skipped} skipped"));
        }
        self.terminal.line(format_args!("{line}"));
    }

    /// Returns everything as one JSON object.
    pub fn to_json(&self, exit: u8, broken: &[Broken]) -> Value {
        let problems: Vec<_> = broken.iter().map(|broken| &broken.said).collect();
        let case = |(case, done): (&&'static Case, &Option<Done>)| {
            let (result, failure, skipped) = match done.as_ref().map(|done| &done.outcome) {
                Some(Outcome::Pass) => ("pass", None, None),
                Some(Outcome::Fail(failure)) => ("fail", Some(failure), None),
                Some(Outcome::Skipped(why) | Outcome::Hindered(why)) => {
                    ("skipped", None, Some(why))
                }
                None => ("skipped", None, None),
            };
            let why = failure.map(|failure| failure.why.as_deref().unwrap_or(case.why));
            json!({
                "number": case.number,
                "section": SECTIONS[case.section() - 1],
                "title": case.title,
                "role": case.role.to_string(),
                "rank": case.rank.name(),
                "needs": case.needs,
                "result": result,
                "sent": case.sent,
                "expected": case.expected,
                "came": failure.map(|failure| &failure.came),
                "why": why,
                "skipped": skipped,
                "notes": done.as_ref().map(|done| &done.words),
            })
        };
        let [pass, fail, hints, skipped] = self.counts();
        json!({
            "pass": pass,
            "fail": fail,
            "hints": hints,
            "skipped": skipped,
            "exit": exit,
            "problems": problems,
            "cases": self.cases.iter().zip(&self.done).map(case).collect::<Vec<_>>(),
        })
    }

    fn progress(&self) {
        let ended = self.done.iter().flatten().count();
        if ended < self.cases.len() {
            on_terminal(&format!("{ended} of {} cases", self.cases.len()));
        } else {
            self.clear_progress();
        }
    }

    fn clear_progress(&self) {
        on_terminal("");
    }
}

/// Shows a line that the next one replaces, where standard error is a terminal.
fn on_terminal(text: &str) {
    let mut err = std::io::stderr();
    if err.is_terminal() {
        // It is only there to be looked at.
        let _ = write!(err, "\r\x1b[K{text}").and_then(|()| err.flush());
    }
}
