//! Log lines as etcd writes them: one JSON object a line on stderr, with `level`, `ts`, `caller` and `msg`.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// What `--log-level`, `--log-format` and `--log-outputs` say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// One of etcd's names; those above error mean error.
    pub level: String,
    pub format: LogFormat,
    pub outputs: Vec<LogOutput>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    /// The same fields between tabs, for people.
    Console,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogOutput {
    Stderr,
    Stdout,
    /// Appended to.
    File(PathBuf),
}

/// The target of lines about calls of the admin API: written whatever the level is.
pub(crate) const AUDIT: &str = "audit";

/// Sends every log line of this process where the settings say, from here on.
///
/// # Errors
/// If a file cannot be opened.
pub fn start(settings: &LogSettings) -> io::Result<()> {
    let outputs = settings.outputs.iter().map(LogOutput::open).collect::<io::Result<_>>()?;
    // Fails only if the embedding program has set its own; then that one stands.
    let _ = tracing::subscriber::set_global_default(subscriber(settings, Mutex::new(Outputs(outputs))));
    Ok(())
}

fn subscriber(
    settings: &LogSettings,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> impl Subscriber + Send + Sync {
    let level = match settings.level.as_str() {
        level @ ("debug" | "info" | "warn") => level,
        _ => "error",
    };
    tracing_subscriber::fmt()
        .with_writer(writer)
        .with_env_filter(EnvFilter::new(format!("{level},{AUDIT}=info")))
        .event_format(Lines(settings.format))
        .finish()
}

impl LogOutput {
    fn open(&self) -> io::Result<Box<dyn io::Write + Send>> {
        Ok(match self {
            LogOutput::Stderr => Box::new(io::stderr()),
            LogOutput::Stdout => Box::new(io::stdout()),
            LogOutput::File(path) => Box::new(OpenOptions::new().create(true).append(true).open(path)?),
        })
    }
}

/// Everything written goes to each of them. One that fails does not keep a line from the others.
struct Outputs(Vec<Box<dyn io::Write + Send>>);

impl io::Write for Outputs {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for output in &mut self.0 {
            let _ = output.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|output| output.flush())
    }
}

struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let metadata = event.metadata();
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let message = fields.0.remove("message").unwrap_or_default();
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG | Level::TRACE => "debug",
        };
        let caller = format!("{}:{}", metadata.target(), metadata.line().unwrap_or(0));
        if self.0 == LogFormat::Console {
            let message = message.as_str().unwrap_or_default();
            return writeln!(writer, "{time}\t{level}\t{caller}\t{message}\t{}", Value::Object(fields.0));
        }
        let mut line =
            format!(r#"{{"level":"{level}","ts":"{time}","caller":{},"msg":{message}"#, Value::String(caller));
        for (name, value) in fields.0 {
            write!(line, ",{}:{value}", Value::String(name))?;
        }
        writeln!(writer, "{line}}}")
    }
}

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_string(), Value::String(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_string(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_string(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    // An operator who wants to hear less of the member has not said that nobody shall know who deleted a tenant.
    #[test]
    fn no_level_turns_the_audit_log_off() {
        for level in ["debug", "info", "warn", "error", "dpanic", "panic", "fatal"] {
            for format in [LogFormat::Json, LogFormat::Console] {
                let settings = LogSettings { level: level.to_string(), format, outputs: Vec::new() };
                let written = Arc::new(Mutex::new(Vec::new()));
                let writer = Arc::clone(&written);
                let lines = subscriber(&settings, move || Shared(Arc::clone(&writer)));
                tracing::subscriber::with_default(lines, || {
                    tracing::info!(target: AUDIT, who = "uid 0", "administration");
                    tracing::warn!(target: AUDIT, who = "uid 1\n", "administration");
                    tracing::info!("something else");
                });
                let written = String::from_utf8(written.lock().unwrap().clone()).unwrap();
                let audit: Vec<&str> = written.lines().filter(|line| line.contains("audit:")).collect();
                assert!(audit.len() == 2 && audit[0].contains("\"who\":\"uid 0\""), "{level} {format:?}: {written}");
                let others = if matches!(level, "debug" | "info") { 1 } else { 0 };
                assert_eq!(written.lines().count(), 2 + others, "{level} {format:?}: {written}");
            }
        }
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
