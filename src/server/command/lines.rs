//! What a command writes to its standard error, line by line.

/// A longer line is cut into several, in bytes.
const MAX_LINE: usize = 1000;

/// Cuts bytes into lines as they come.
#[derive(Debug, Default)]
pub struct Lines {
    unfinished: Vec<u8>,
    last: String,
}

impl Lines {
    /// Calls `print` for each line that these bytes complete.
    pub fn push(&mut self, mut bytes: &[u8], mut print: impl FnMut(&str)) {
        while !bytes.is_empty() {
            let room = bytes.len().min(MAX_LINE - self.unfinished.len());
            let end = memchr::memchr(b'\n', &bytes[..room]);
            self.unfinished.extend_from_slice(&bytes[..end.unwrap_or(room)]);
            bytes = &bytes[end.map_or(room, |end| end + 1)..];
            if end.is_some() || self.unfinished.len() == MAX_LINE {
                self.finish(&mut print);
            }
        }
    }

    /// Nothing more comes: calls `print` for a line without an end.
    pub fn finish(&mut self, mut print: impl FnMut(&str)) {
        let line = String::from_utf8_lossy(&self.unfinished);
        let line = line.trim_end();
        if !line.is_empty() {
            print(line);
            self.last.clear();
            self.last.push_str(line);
        }
        self.unfinished.clear();
    }

    /// The last line that was not empty; empty if there was none.
    pub fn last(&self) -> &str {
        &self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_however_their_bytes_come() {
        let long = "x".repeat(MAX_LINE);
        let text = format!("one\n\n  two \r\n{long}yz\n\u{e9}\nend");
        for piece in [1, 2, 3, 7, MAX_LINE, text.len()] {
            let (mut lines, mut printed) = (Lines::default(), Vec::new());
            for bytes in text.as_bytes().chunks(piece) {
                lines.push(bytes, |line| printed.push(line.to_owned()));
            }
            assert_eq!(lines.last(), "\u{e9}");
            lines.finish(|line| printed.push(line.to_owned()));
            assert_eq!(printed, ["one", "  two", &long, "yz", "\u{e9}", "end"], "{piece}");
            assert_eq!(lines.last(), "end");
        }
    }
}
