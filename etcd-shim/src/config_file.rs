//! etcd's `--config-file`: flags by their names in YAML, those of TLS in sections of their own.
//!
//! As in etcd, a configuration file stands for the whole command line: flags and variables beside it do not count, and keys
//! that mean nothing are passed over. Scalars are taken as they are written, so a value means what it means as a flag; a
//! duration may also be a bare number, of nanoseconds, and a list stands for the same between commas.

use std::path::Path;

use saphyr::{Yaml, YamlLoader};
use saphyr_parser::Parser;

/// The sections whose keys are flags behind a prefix.
const SECTIONS: &[(&str, &str)] = &[("client-transport-security", ""), ("peer-transport-security", "peer-")];

/// Reads a file: flags as text, in the file's order.
///
/// # Errors
/// One line that says what is wrong with the file.
pub(crate) fn read(path: &Path) -> Result<Vec<(String, String)>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))?;
    parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

fn parse(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut loader = YamlLoader::<Yaml<'_>>::default();
    // What a value is the flag knows.
    loader.early_parse(false);
    Parser::new_from_str(text).load(&mut loader, false).map_err(|error| error.to_string().replace('\n', " "))?;
    let mut flags = Vec::new();
    match loader.into_documents().first() {
        None => {}
        Some(document) if document.is_mapping() => section(document, "", &mut flags)?,
        Some(document) if scalar(document).is_some_and(|text| is_null(&text)) => {}
        Some(_) => return Err("want a mapping of flags to values".to_string()),
    }
    Ok(flags)
}

fn section(mapping: &Yaml<'_>, prefix: &str, flags: &mut Vec<(String, String)>) -> Result<(), String> {
    for (key, value) in mapping.as_mapping().into_iter().flatten() {
        let key = scalar(key).ok_or("a key is not a scalar")?;
        let inner = SECTIONS.iter().find(|(name, _)| prefix.is_empty() && *name == key);
        if let (Some((_, prefix)), Yaml::Mapping(_)) = (inner, value) {
            section(value, prefix, flags)?;
            continue;
        }
        let text = match value.as_sequence() {
            Some(items) => items.iter().map(scalar).collect::<Option<Vec<_>>>().map(|items| items.join(",")),
            None => scalar(value),
        };
        let text = text.ok_or_else(|| format!("the value of {key} is neither a scalar nor a list of them"))?;
        if !is_null(&text) {
            flags.push((format!("{prefix}{key}"), text));
        }
    }
    Ok(())
}

/// As it is written.
fn scalar(node: &Yaml<'_>) -> Option<String> {
    if let Yaml::Representation(text, ..) = node { Some(text.to_string()) } else { None }
}

/// Nothing is said, as for every key of etcd's sample file.
fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(String, String)> {
        parse(text).unwrap()
    }

    #[test]
    fn flags_are_what_is_written() {
        let text = "# of etcd's sample\nname: 'm1'\ndata-dir:\nquota-backend-bytes: 0\nsnapshot-count: 10000\n\
                    listen-client-urls: http://127.0.0.1:2379,http://127.0.0.1:2378\nlog-outputs: [stderr, a.log]\n\
                    strict-reconfig-check: false\nclient-transport-security:\n  cert-file: a.crt\n  auto-tls: true\n\
                    peer-transport-security:\n  cert-file: b.crt\n  client-cert-auth: true\n";
        let expected = [
            ("name", "m1"),
            ("quota-backend-bytes", "0"),
            ("snapshot-count", "10000"),
            ("listen-client-urls", "http://127.0.0.1:2379,http://127.0.0.1:2378"),
            ("log-outputs", "stderr,a.log"),
            ("strict-reconfig-check", "false"),
            ("cert-file", "a.crt"),
            ("auto-tls", "true"),
            ("peer-cert-file", "b.crt"),
            ("peer-client-cert-auth", "true"),
        ];
        assert_eq!(pairs(text), expected.map(|(name, value)| (name.to_string(), value.to_string())));
        assert_eq!(pairs(""), []);
        assert_eq!(pairs("~"), []);
    }

    #[test]
    fn what_is_no_configuration_is_one_line() {
        for text in ["- a\n- b\n", "name: {a: b}\n", "a: [b\n", "\"", "just text", "? [a]\n: b\n"] {
            let error = parse(text).unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{text:?}: {error}");
        }
    }
}
