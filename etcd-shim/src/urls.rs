//! URLs of members, by etcd's rules: what `--initial-cluster`, `--initial-advertise-peer-urls` and `MemberAdd` take.

use url::Url;

/// Why a text is no URL of a member. In etcd's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberUrlError {
    #[error("parse {0:?}: {1}")]
    Parse(String, url::ParseError),
    #[error("URL scheme must be http, https, unix, or unixs: {0}")]
    Scheme(String),
    #[error("URL address does not have the form \"host:port\": {0}")]
    HostPort(String),
    #[error("URL must not contain a path: {0}")]
    Path(String),
}

/// Checks one URL. It stands for itself from then on: it is not normalised, because ids are made of its bytes.
///
/// # Errors
/// [`MemberUrlError`].
pub fn check_member_url(text: &str) -> Result<(), MemberUrlError> {
    let url = Url::parse(text).map_err(|error| MemberUrlError::Parse(text.to_string(), error))?;
    match url.scheme() {
        "http" | "https" => {}
        "unix" | "unixs" => return Ok(()),
        _ => return Err(MemberUrlError::Scheme(text.to_string())),
    }
    if !has_port(text) || !url.has_host() {
        return Err(MemberUrlError::HostPort(text.to_string()));
    }
    // A parsed URL has got a path in any case.
    let behind = text.split_once("://").map_or("", |(_, behind)| behind);
    if behind.contains('/') { Err(MemberUrlError::Path(text.to_string())) } else { Ok(()) }
}

/// Whether the text names a port; the parsed URL no longer says so of a scheme's usual one.
pub(crate) fn has_port(text: &str) -> bool {
    let authority = text.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or(""));
    authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_members_are_etcds() {
        for good in
            ["http://127.0.0.1:2380", "https://a.example:443", "http://[::1]:2380", "unix://m1:2380", "unixs://m"]
        {
            assert_eq!(check_member_url(good), Ok(()), "{good}");
        }
        for (bad, text) in [
            ("", "parse \"\""),
            ("127.0.0.1:2380", "parse"),
            ("ftp://a:1", "URL scheme must be http, https, unix, or unixs: ftp://a:1"),
            ("http://127.0.0.1", "URL address does not have the form \"host:port\""),
            ("http://127.0.0.1:x", "parse"),
            ("http://a:2380/path", "URL must not contain a path"),
            ("http://a:2380/", "URL must not contain a path"),
        ] {
            let error = check_member_url(bad).unwrap_err().to_string();
            assert!(error.starts_with(text), "{bad}: {error}");
        }
    }
}
