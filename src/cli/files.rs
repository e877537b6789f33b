//! The files that options name, and standard input.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use crate::net::os_error::reason;
use crate::protocol::diagnose::place;

/// The longest token, in bytes.
const MAX_TOKEN: u64 = 4096;

/// The most that is read of a packet file, in bytes: a device would have no end.
const MAX_PACKET_FILE: u64 = 256 << 20;

/// Reads a token file: its first line.
///
/// # Errors
///
/// What is wrong with the file; never what is in it.
pub fn read_token(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let mut line = Vec::new();
    File::open(path)
        .and_then(|file| BufReader::new(file.take(MAX_TOKEN + 1)).read_until(b'\n', &mut line))
        .map_err(|error| format!("could not read the token file {shown}: {}", reason(&error)))?;
    if line.len() as u64 > MAX_TOKEN {
        return Err(format!(
            "the first line of the token file {shown}, which is the token, is longer than {MAX_TOKEN} bytes"
        ));
    }
    match String::from_utf8(line).as_deref().map(str::trim) {
        Err(_) => Err(format!("the first line of the token file {shown} is not UTF-8")),
        Ok("") => Err(format!("the token file {shown} is empty; its first line is the token")),
        Ok(token) => Ok(token.to_owned()),
    }
}

/// Reads a packet file, or with `-` standard input. Returns it with the name to show.
///
/// # Errors
///
/// That it cannot be read, or has no end in sight.
pub fn read_packets(path: &Path) -> Result<(String, Vec<u8>), String> {
    let (name, input): (_, io::Result<Box<dyn Read>>) = if path == Path::new("-") {
        ("standard input".to_owned(), Ok(Box::new(io::stdin())))
    } else {
        (path.display().to_string(), File::open(path).map(|file| Box::new(file) as _))
    };
    let mut content = Vec::new();
    input
        .and_then(|input| input.take(MAX_PACKET_FILE + 1).read_to_end(&mut content))
        .map_err(|error| format!("could not read {name}: {}", reason(&error)))?;
    if content.len() as u64 > MAX_PACKET_FILE {
        return Err(format!(
            "{name} has more than {} MiB; split it into several files",
            MAX_PACKET_FILE >> 20
        ));
    }
    Ok((name, content))
}

/// Reads a message's text of at most `limit` bytes from standard input.
///
/// # Errors
///
/// That it cannot be read, is longer, or is no UTF-8.
pub fn read_text(limit: usize) -> Result<String, String> {
    let mut content = Vec::new();
    io::stdin()
        .take(limit as u64 + 1)
        .read_to_end(&mut content)
        .map_err(|error| format!("could not read standard input: {}", reason(&error)))?;
    if content.len() > limit {
        return Err(format!(
            "standard input has more than {limit} bytes, the longest packet (-max-packet)"
        ));
    }
    String::from_utf8(content).map_err(|error| {
        let (line, column) = place(&error.as_bytes()[..error.utf8_error().valid_up_to()]);
        format!(
            "standard input: line {line}, column {column}: not UTF-8, as a message's text must be; \
             encode it, for example as base64"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_first_line_of_its_file() {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("token-of-test-{}", std::process::id()));
        let mut read = |content: &str| {
            std::fs::write(&path, content).unwrap();
            read_token(&path)
        };
        let outcomes = ["secret", " secret \r\nnot this\n", "", "\n\nsecret"].map(&mut read);
        let longest = ["x".repeat(4096), "x".repeat(4097)].map(|content| read(&content));
        let missing = std::fs::remove_file(&path).map(|()| read_token(&path)).unwrap();
        assert_eq!(outcomes[0].as_deref(), Ok("secret"));
        assert_eq!(outcomes[1].as_deref(), Ok("secret"));
        let shown = path.display();
        let empty = format!("the token file {shown} is empty; its first line is the token");
        assert_eq!(outcomes[2..], [Err(empty.clone()), Err(empty)]);
        assert_eq!(longest[0].as_ref().map(String::len), Ok(4096));
        assert!(longest[1].as_ref().unwrap_err().ends_with("is longer than 4096 bytes"));
        let gone = format!("could not read the token file {shown}: no such file or directory");
        assert_eq!(missing, Err(gone));
    }
}
