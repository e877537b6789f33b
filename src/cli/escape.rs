//! What peers say, as text that cannot change a terminal or look like more than one line.

use std::fmt::{self, Write as _};

use crate::protocol::Id;

/// Characters of a peer's text that are shown.
const MAX_TEXT: usize = 64;

/// Characters of a peer's reason that are shown: a proxy's names every server that it tried.
const MAX_REASON: usize = 1000;

/// A peer's text as printable characters: control characters, line breaks, direction overrides and
/// other invisible ones are escaped, and past 64 characters it is shortened, with its size.
#[derive(Debug, Clone, Copy)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(self.0, MAX_TEXT, f)
    }
}

/// An id as printable characters, shortened as a peer's other text.
#[derive(Debug, Clone, Copy)]
pub struct EscapedId<'a>(pub &'a Id<'a>);

impl fmt::Display for EscapedId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Id::Integer(number) => number.fmt(f),
            id => Escaped(&id.text()).fmt(f),
        }
    }
}

/// A peer's reason as printable characters, shortened only past a thousand.
#[derive(Debug, Clone, Copy)]
pub struct EscapedReason<'a>(pub &'a str);

impl fmt::Display for EscapedReason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(self.0, MAX_REASON, f)
    }
}

fn show(text: &str, limit: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let end = text.char_indices().nth(limit).map_or(text.len(), |(at, _)| at);
    EscapeWriter(f).write_str(&text[..end])?;
    if end < text.len() {
        write!(f, "… ({} bytes)", text.len())?;
    }
    Ok(())
}

/// Takes text and writes it as printable characters. Every line goes through it, so that no part of
/// one can change the terminal or look like two.
pub(crate) struct EscapeWriter<'a, W>(pub(crate) &'a mut W);

impl<W: fmt::Write> fmt::Write for EscapeWriter<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return self.0.write_str(text);
        }
        text.chars().try_for_each(|character| {
            if is_printable(character) {
                self.0.write_char(character)
            } else {
                write!(self.0, "{}", character.escape_default())
            }
        })
    }
}

/// Whether a character shows as itself and leaves its neighbours alone. What Unicode calls default
/// ignorable shows as nothing, so that text can hide in it; but joiners and variation selectors are
/// needed by several scripts and many emoji, except those selectors (U+E0100 on) that only choose
/// among the shapes of an ideograph.
pub(crate) fn is_printable(character: char) -> bool {
    !character.is_control()
        && !matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_many_scripts_is_shown_as_it_is() {
        for text in [
            "hello",
            "Grüße, мир, 世界, नमस्ते, שלום, 한국어",
            "👩‍👩‍👧 🏳️‍🌈 ❤\u{fe0f}",
            "می\u{200c}خواهم ᠠ\u{180b}",
            "back\\slash \"quoted\"",
        ] {
            assert_eq!(Escaped(text).to_string(), text);
        }
    }

    #[test]
    fn what_could_change_the_terminal_is_escaped() {
        assert_eq!(Escaped("a\nb\r\t").to_string(), "a\\nb\\r\\t");
        assert_eq!(Escaped("\u{1b}[2J\0\u{9b}").to_string(), "\\u{1b}[2J\\u{0}\\u{9b}");
        assert_eq!(Escaped("\u{202e}evil\u{2066}").to_string(), "\\u{202e}evil\\u{2066}");
    }

    #[test]
    fn invisible_characters_are_escaped() {
        // The first and the last of each range.
        let invisible = "\u{ad}\u{34f}\u{61c}\u{115f}\u{1160}\u{17b4}\u{17b5}\u{180e}\u{200b}\
                         \u{200e}\u{200f}\u{2060}\u{206f}\u{3164}\u{feff}\u{ffa0}\u{fff0}\u{fffb}\
                         \u{1bca0}\u{1bca3}\u{1d173}\u{1d17a}\u{e0000}\u{e007f}\u{e0100}\u{e01ef}\
                         \u{e0fff}";
        assert_eq!(Escaped(invisible).to_string(), invisible.escape_unicode().to_string());
    }

    #[test]
    fn long_text_is_shortened_with_its_size() {
        let just = "é".repeat(64);
        assert_eq!(Escaped(&just).to_string(), just);
        let long = "é".repeat(65);
        assert_eq!(Escaped(&long).to_string(), format!("{just}… (130 bytes)"));
    }
}
