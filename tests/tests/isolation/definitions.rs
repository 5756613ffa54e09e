//! What there is to try: every method that the repository defines, and every field of what it is sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use protox::Compiler;
use protox::prost_reflect::{DescriptorPool, DynamicMessage, Kind, MapKey, MessageDescriptor, Value};
use tenure_etcd_shim::server::SERVICES;

/// A method, as far as it is defined.
pub(crate) struct Method {
    /// `None`: bytes of our own.
    pub(crate) input: Option<MessageDescriptor>,
    pub(crate) output: Option<MessageDescriptor>,
    /// Whether tenants may call its service at all.
    pub(crate) served: bool,
}

/// Every method that exists, as `package.Service/Method`: of all services of all .proto files, and those between members.
pub(crate) fn methods() -> BTreeMap<String, Method> {
    let pool = pool();
    let mut methods = BTreeMap::new();
    for service in pool.services() {
        let served = SERVICES.contains(&service.full_name());
        for method in service.methods() {
            let (input, output) = (Some(method.input()), Some(method.output()));
            methods.insert(format!("{}/{}", service.full_name(), method.name()), Method { input, output, served });
        }
    }
    for service in SERVICES {
        assert!(pool.get_service_by_name(service).is_some(), "{service} is served, and no .proto file defines it");
    }
    for path in paths_in_code() {
        let input = match path.as_str() {
            "tenure.peer.v1.Peer/Call" => pool.get_message_by_name("tenure.cell.v1.PeerCall"),
            _ => None,
        };
        methods.entry(path).or_insert(Method { input, output: None, served: false });
    }
    methods
}

/// All .proto files, compiled together.
fn pool() -> DescriptorPool {
    let protos = files("proto");
    // A file is imported by its path below a directory of this name.
    let includes: BTreeSet<&Path> =
        protos.iter().filter_map(|file| file.ancestors().find(|dir| dir.ends_with("proto"))).collect();
    let mut compiler = Compiler::new(includes).unwrap();
    compiler.open_files(&protos).unwrap();
    compiler.descriptor_pool()
}

/// Methods that no .proto file defines: what members ask each other is named by strings.
fn paths_in_code() -> BTreeSet<String> {
    const OURS: &str = "\"/tenure.";
    let mut paths = BTreeSet::new();
    for file in files("rs") {
        let text = std::fs::read_to_string(file).unwrap();
        let named = text.split(OURS).skip(1).filter_map(|rest| rest.split('"').next());
        paths.extend(named.map(|rest| format!("tenure.{rest}")));
    }
    let of_peers = paths.iter().filter(|path| path.starts_with("tenure.peer.v1.Peer/")).count();
    assert!(of_peers >= 4, "{paths:?}");
    paths
}

/// Files of the repository, but those of tests, by how their names end.
fn files(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() && !name.starts_with('.') && !["target", "tests"].contains(&name) {
                dirs.push(path);
            } else if path.extension().is_some_and(|ends| ends == extension) {
                found.push(path);
            }
        }
    }
    found
}

/// Every field of a message and of all that can stand in it, and of enums every value but 0, which is not sent.
pub(crate) fn fields(of: &MessageDescriptor) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    add_fields(of, &mut names);
    names
}

fn add_fields(of: &MessageDescriptor, names: &mut BTreeSet<String>) {
    for field in of.fields() {
        // A message may hold its own kind.
        if !names.insert(field.full_name().to_string()) {
            continue;
        }
        let kind = field.kind();
        if let Some(inner) = kind.as_message() {
            add_fields(inner, names);
        }
        if let Some(of) = kind.as_enum() {
            let sent = of.values().filter(|value| value.number() != 0);
            names.extend(sent.map(|value| format!("{} = {}", field.full_name(), value.name())));
        }
    }
}

/// Those of [`fields`] that a message has set.
pub(crate) fn carried(message: &DynamicMessage) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (field, value) in message.fields() {
        names.insert(field.full_name().to_string());
        let kind = field.kind();
        for value in each(value) {
            if let Some(inner) = value.as_message() {
                names.extend(carried(inner));
            }
            let named = kind.as_enum().zip(value.as_enum_number()).and_then(|(of, number)| of.get_value(number));
            names.extend(named.map(|named| format!("{} = {}", field.full_name(), named.name())));
        }
        if field.is_map() {
            names.extend(kind.as_message().into_iter().flat_map(fields));
        }
    }
    names
}

fn each(value: &Value) -> &[Value] {
    value.as_list().unwrap_or(std::slice::from_ref(value))
}

/// As many as bring each alternative of every oneof, and each value of every enum.
const FILLED: usize = 16;

/// Messages that have every field between them. For methods that refuse whatever they are sent: where it matters what is sent,
/// there is an attempt by hand.
pub(crate) fn filled(of: &MessageDescriptor) -> Vec<DynamicMessage> {
    (0..FILLED).map(|turn| filled_once(of, turn)).collect()
}

fn filled_once(of: &MessageDescriptor, turn: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        let alternatives: Vec<_> = field.containing_oneof().iter().flat_map(|oneof| oneof.fields()).collect();
        let count = alternatives.len().max(1);
        if alternatives.get(turn % count).is_some_and(|chosen| *chosen != field) {
            continue;
        }
        // Each alternative gets its turns.
        let turn = turn / count;
        let kind = field.kind();
        let value = if field.is_map() {
            let of = kind.as_message().expect("an entry").map_entry_value_field();
            Value::Map(HashMap::from([(MapKey::String("acme".to_string()), something(&of.kind(), turn))]))
        } else if field.is_list() {
            Value::List(vec![something(&kind, turn)])
        } else {
            something(&kind, turn)
        };
        message.set_field(&field, value);
    }
    message
}

/// What somebody would send who knows of `acme`. The tenant's number is 2.
fn something(kind: &Kind, turn: usize) -> Value {
    match kind {
        Kind::Bool => Value::Bool(true),
        Kind::String => Value::String("acme".to_string()),
        Kind::Bytes => Value::Bytes("acme".into()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(2),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(2),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(2),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(2),
        Kind::Float => Value::F32(2.0),
        Kind::Double => Value::F64(2.0),
        Kind::Enum(of) => {
            Value::EnumNumber(of.values().nth(turn % of.values().len()).expect("there are so many").number())
        }
        Kind::Message(of) => Value::Message(filled_once(of, turn)),
    }
}
