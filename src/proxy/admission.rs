//! Who may register a server with the proxy.

use std::net::SocketAddr;

use sha1::{Digest, Sha1};

use crate::protocol::Setup;

/// Who may register a server. A registered server receives other people's messages.
#[derive(Debug, Clone)]
pub enum Admission {
    /// Peers with a loopback address.
    Loopback,
    /// Peers that know the token; this is its SHA-1.
    Token([u8; 20]),
}

impl Admission {
    /// Admits only peers that know `token`.
    pub fn with_token(token: &str) -> Self {
        Admission::Token(Sha1::digest(token.as_bytes()).into())
    }

    /// Checks whether `peer` may register with this setup packet.
    ///
    /// # Errors
    ///
    /// If it may not; the reason is for the peer.
    pub fn admits(&self, setup: &Setup<'_>, peer: SocketAddr) -> Result<(), &'static str> {
        match self {
            Admission::Loopback if peer.ip().to_canonical().is_loopback() => Ok(()),
            Admission::Loopback => Err(
                "only servers on the proxy's own host may register; start both with -token-file to allow others",
            ),
            Admission::Token(hash) => match &setup.token {
                Some(token) if is_same(hash, &Sha1::digest(token.as_bytes())) => Ok(()),
                Some(_) => Err("the token is not the one that the proxy was started with"),
                None => Err("registering here takes a token (-token-file)"),
            },
        }
    }
}

/// Compares two hashes in constant time, so that the time does not tell how much of a guess is
/// right.
fn is_same(one: &[u8; 20], other: &[u8]) -> bool {
    one.iter().zip(other).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::protocol::Id;

    fn admitted(admission: &Admission, token: Option<&str>, from: &str) -> bool {
        let setup = Setup { token: token.map(Cow::Borrowed), ..Setup::new(Id::ZERO, Id::ZERO, 1) };
        admission.admits(&setup, SocketAddr::new(from.parse().unwrap(), 1)).is_ok()
    }

    #[test]
    fn without_a_token_whoever_is_not_on_this_host_is_kept_out() {
        for from in ["127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1"] {
            assert!(admitted(&Admission::Loopback, None, from), "{from}");
        }
        for from in ["192.0.2.7", "0.0.0.0", "10.0.0.1", "::ffff:192.0.2.7", "fe80::1", "::"] {
            assert!(!admitted(&Admission::Loopback, None, from), "{from}");
            assert!(!admitted(&Admission::Loopback, Some("127.0.0.1"), from), "{from}");
        }
    }

    #[test]
    fn with_a_token_it_alone_counts() {
        let admission = Admission::with_token("secret");
        for from in ["127.0.0.1", "192.0.2.7"] {
            assert!(admitted(&admission, Some("secret"), from), "{from}");
            for wrong in [None, Some(""), Some("secre"), Some("secret "), Some("Secret")] {
                assert!(!admitted(&admission, wrong, from), "{wrong:?} from {from}");
            }
        }
    }

    #[test]
    fn hashes_that_differ_anywhere_are_not_the_same() {
        let hash = [7; 20];
        assert!(is_same(&hash, &hash));
        for at in 0..20 {
            let mut other = hash;
            other[at] ^= 0x80;
            assert!(!is_same(&hash, &other), "at {at}");
        }
    }
}
