//! Holds a parsed file against the JSON Schema that the [raw types](super::raw) generate.
//!
//! serde stops at the first thing that it cannot read. The validator goes through all of a file, reports each problem
//! with its path, and takes what is wrong out of the value, so that serde can read the rest:
//!
//! * a member that is not known, or wrong and not required, is taken out of its object;
//! * a wrong required member makes its object wrong, a wrong element its list;
//! * of the file's outermost object, every wrong member is taken out.
//!
//! It knows the part of JSON Schema that schemars writes for these types, which is not all of it.

use serde_json::{Map, Value};

use super::json;
use super::problem::{Findings, Place, ProblemKind, Report, list, push_index, push_key, shorten};

/// What else Flame's roles do on a channel: collectives of its distributed and hybrid modes, heartbeats.
const FLAMES_TAGS: [&str; 5] = [
    "ring_allreduce",
    "allreduce",
    "heartbeat",
    "heartbeat_send",
    "heartbeat_recv",
];

/// Reports all that is wrong with `value` and takes it out. Afterwards it is an object that fits `schema`, a part of
/// `root`, but for required members that are missing.
pub(super) fn validate(root: &Value, schema: &Value, value: &mut Value, at: &Place, findings: &mut Findings) {
    let mut validator = Validator {
        root,
        at: at.clone(),
        findings,
    };
    match value {
        Value::Object(members) => {
            validator.object(schema, members);
        }
        other => {
            validator
                .report(ProblemKind::Invalid, describe(other))
                .expected("an object");
            *other = Value::Object(Map::new());
        }
    }
}

/// The definition of that name in a schema.
pub(super) fn definition<'w>(root: &'w Value, name: &str) -> &'w Value {
    root.get("$defs")
        .and_then(|definitions| definitions.get(name))
        .unwrap_or(root)
}

struct Validator<'w> {
    root: &'w Value,
    at: Place,
    findings: &'w mut Findings,
}

impl<'w> Validator<'w> {
    /// Whether the value, with what was taken out of it, fits the schema.
    fn value(&mut self, schema: &'w Value, value: &mut Value) -> bool {
        let schema = self.resolve(schema);
        let alternatives = self.alternatives(schema);
        if !alternatives.is_empty() {
            return self.one_of(&alternatives, value);
        }
        if let Some(names) = names(schema) {
            return self.name(&names, value);
        }
        if types(schema).is_some_and(|mut types| types.any(|name| name == "integer"))
            && let Some(whole) = json::whole(value)
        {
            *value = Value::Number(whole);
        }
        let fits = types(schema).is_none_or(|mut types| types.any(|name| is_of_type(value, name)));
        if !fits {
            self.misfit(schema, describe(value));
            return false;
        }
        match value {
            Value::Number(_) => self.number(schema, value),
            Value::Array(elements) => self.list(schema, elements),
            Value::Object(members) => self.object(schema, members),
            Value::Null | Value::Bool(_) | Value::String(_) => true,
        }
    }

    fn number(&mut self, schema: &'w Value, value: &Value) -> bool {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        let fits = value.as_f64().is_some_and(|number| {
            bound("minimum").is_none_or(|minimum| number >= minimum)
                && bound("exclusiveMinimum").is_none_or(|minimum| number > minimum)
                && bound("maximum").is_none_or(|maximum| number <= maximum)
        });
        let wide = schema.get("format").and_then(Value::as_str) != Some("uint32");
        let fits = fits && (wide || value.as_u64().is_some_and(|number| u32::try_from(number).is_ok()));
        if !fits {
            self.misfit(schema, describe(value));
        }
        fits
    }

    fn list(&mut self, schema: &'w Value, elements: &mut [Value]) -> bool {
        let bound = |name: &str| schema.get(name).and_then(Value::as_u64);
        let length = elements.len() as u64;
        let mut fits = bound("minItems").is_none_or(|minimum| length >= minimum)
            && bound("maxItems").is_none_or(|maximum| length <= maximum);
        if !fits {
            self.misfit(schema, format!("a list of {length}"));
        }
        if let Some(item) = schema.get("items") {
            for (i, element) in elements.iter_mut().enumerate() {
                fits &= self.within(
                    |path| push_index(path, i),
                    |validator| validator.value(item, element),
                );
            }
        }
        fits
    }

    fn object(&mut self, schema: &'w Value, members: &mut Map<String, Value>) -> bool {
        let known = schema.get("properties").and_then(Value::as_object);
        let required = |key: &str| strings(schema.get("required")).any(|name| name == key);
        let mut fits = true;
        members.retain(|key, member| {
            // A remark, as Flame's own files have them.
            if key.starts_with("//") {
                return false;
            }
            let member_schema = known.and_then(|known| known.get(key));
            let kept = match member_schema.or_else(|| schema.get("additionalProperties")) {
                Some(Value::Bool(false)) => {
                    let known = known.into_iter().flatten().map(|(name, _)| name.as_str());
                    self.within(
                        |path| push_key(path, key),
                        |validator| {
                            let found = format!("unknown field, of value {}", describe_all(member));
                            validator.report(ProblemKind::Unknown, found).one_of(key, known);
                        },
                    );
                    return false;
                }
                Some(schema) => self.within(
                    |path| push_key(path, key),
                    |validator| validator.value(schema, member),
                ),
                None => true,
            };
            fits &= kept || (member_schema.is_some() && !required(key));
            kept
        });
        for name in strings(schema.get("required")) {
            if !members.contains_key(name) {
                fits = false;
                let member = known.and_then(|known| known.get(name));
                // If it is here and wrong, that has been said.
                let place = self.at.key(name);
                if self.findings.full() || !self.findings.any_at(&place) {
                    let expected =
                        member.map(|member| self.lazily(|validator| validator.expectation(member)));
                    self.findings
                        .add(ProblemKind::Missing, &place, "missing")
                        .expected(expected.unwrap_or_default());
                }
            }
        }
        fits
    }

    /// A name out of a fixed set.
    fn name(&mut self, names: &[&'w str], value: &Value) -> bool {
        match value.as_str() {
            Some(name) if names.contains(&name) => true,
            Some(name) if FLAMES_TAGS.contains(&name) && self.at.path.contains("funcTags") => {
                let found = format!("tag {name} is not supported yet");
                self.report(ProblemKind::Unsupported, found).expected(list(names));
                false
            }
            Some(name) => {
                let found = format!("unknown name {}", describe(value));
                self.report(ProblemKind::Unknown, found)
                    .one_of(name, names.iter().copied());
                false
            }
            None => {
                self.report(ProblemKind::Invalid, describe(value))
                    .expected(list(names));
                false
            }
        }
    }

    /// A value that may have one of several forms: finds the form that was meant, and holds it against that.
    fn one_of(&mut self, alternatives: &[&'w Value], value: &mut Value) -> bool {
        match value {
            Value::Null if alternatives.iter().any(|form| is_null(form)) => return true,
            Value::String(_) => {
                let names: Vec<&str> = alternatives.iter().copied().filter_map(names).flatten().collect();
                if !names.is_empty() {
                    return self.name(&names, value);
                }
            }
            Value::Object(members) => {
                if let Some((tag, names)) = tag(alternatives) {
                    let Some(name) = members.get(tag) else {
                        let place = self.at.key(tag);
                        self.findings
                            .add(ProblemKind::Missing, &place, "missing")
                            .expected(list(&names));
                        return false;
                    };
                    if !self.within(
                        |path| push_key(path, tag),
                        |validator| validator.name(&names, name),
                    ) {
                        return false;
                    }
                    let meant = names.iter().position(|known| name.as_str() == Some(known));
                    let tagged = alternatives
                        .iter()
                        .copied()
                        .filter(|form| tag_of(form, tag).is_some());
                    if let Some(form) = meant.and_then(|i| tagged.clone().nth(i)) {
                        return self.object(form, members);
                    }
                }
                let objects = || {
                    alternatives
                        .iter()
                        .copied()
                        .filter(|form| form.get("properties").is_some())
                };
                let meant =
                    |form: &&Value| strings(form.get("required")).any(|key| members.contains_key(key));
                if let Some(form) = objects().find(meant) {
                    return self.object(form, members);
                }
                let only = objects().nth(1).is_none().then(|| objects().next()).flatten();
                if let Some(form) = only {
                    return self.object(form, members);
                }
                // A misspelt key tells best what was meant.
                let known: Vec<&str> = objects().flat_map(|form| strings(form.get("required"))).collect();
                if let Some(key) = members.keys().next().filter(|_| !known.is_empty()) {
                    let key = key.clone();
                    self.within(
                        |path| push_key(path, &key),
                        |validator| {
                            validator
                                .report(ProblemKind::Unknown, "unknown field")
                                .one_of(&key, known);
                        },
                    );
                    return false;
                }
            }
            _ => {}
        }
        if let [form] = alternatives
            .iter()
            .filter(|form| !is_null(form))
            .collect::<Vec<_>>()[..]
        {
            return self.value(form, value);
        }
        let expected = self.lazily(|validator| validator.expectations(alternatives));
        self.report(ProblemKind::Invalid, describe(value))
            .expected(expected);
        false
    }

    /// The forms of a value that may have several; empty if it has one.
    fn alternatives(&self, schema: &'w Value) -> Vec<&'w Value> {
        let forms = schema
            .get("anyOf")
            .or_else(|| schema.get("oneOf"))
            .and_then(Value::as_array);
        let mut alternatives = Vec::new();
        for form in forms
            .into_iter()
            .flatten()
            .filter(|_| schema.get("properties").is_none())
        {
            let form = self.resolve(form);
            let inner = self.alternatives(form);
            if inner.is_empty() {
                alternatives.push(form);
            } else {
                alternatives.extend(inner);
            }
        }
        alternatives
    }

    /// What a `$ref` refers to.
    fn resolve(&self, schema: &'w Value) -> &'w Value {
        let pointer = schema
            .get("$ref")
            .and_then(Value::as_str)
            .and_then(|link| link.strip_prefix('#'));
        pointer
            .and_then(|pointer| self.root.pointer(pointer))
            .unwrap_or(schema)
    }

    /// What the schema demands, in words.
    fn expectation(&self, schema: &'w Value) -> String {
        let schema = self.resolve(schema);
        let alternatives = self.alternatives(schema);
        if !alternatives.is_empty() {
            return self.expectations(&alternatives);
        }
        if let Some(names) = names(schema) {
            return list(&names);
        }
        let name = types(schema).and_then(|mut types| types.find(|&name| name != "null"));
        let bound = |name: &str| schema.get(name).filter(|bound| bound.as_f64() != Some(0.0));
        match name {
            Some(kind @ ("integer" | "number")) => {
                let what = if kind == "integer" {
                    "a whole number"
                } else {
                    "a number"
                };
                let narrow = schema.get("format").and_then(Value::as_str) == Some("uint32");
                if let (Some(minimum), Some(maximum)) = (schema.get("minimum"), schema.get("maximum")) {
                    return format!("{what} from {minimum} to {maximum}");
                }
                if let (Some(minimum), Some(maximum)) =
                    (schema.get("exclusiveMinimum"), schema.get("maximum"))
                {
                    return format!("{what} above {minimum}, at most {maximum}");
                }
                match (
                    bound("minimum"),
                    schema.get("minimum"),
                    schema.get("exclusiveMinimum"),
                ) {
                    (Some(minimum), ..) if narrow => format!("{what} from {minimum} to {}", u32::MAX),
                    (Some(minimum), ..) => format!("{what} of at least {minimum}"),
                    (_, Some(minimum), _) => format!("{what} not below {minimum}"),
                    (.., Some(minimum)) => format!("{what} above {minimum}"),
                    _ => what.to_owned(),
                }
            }
            Some("array") => {
                let item = schema.get("items").map(|item| self.expectation(item));
                let of = item.map_or_else(String::new, |item| format!(", each {item}"));
                match (schema.get("minItems"), schema.get("maxItems")) {
                    (Some(minimum), Some(maximum)) if minimum == maximum => {
                        format!("a list of {minimum}{of}")
                    }
                    (Some(minimum), _) => format!("a list of at least {minimum}{of}"),
                    _ => format!("a list{of}"),
                }
            }
            Some("object") => {
                let keys: Vec<&str> = strings(schema.get("required")).collect();
                if keys.is_empty() {
                    "an object".to_owned()
                } else {
                    format!("an object with {}", keys.join(", "))
                }
            }
            Some("string") => "a string".to_owned(),
            Some("boolean") => "true or false".to_owned(),
            _ => "a value".to_owned(),
        }
    }

    fn expectations(&self, alternatives: &[&'w Value]) -> String {
        let words: Vec<String> = alternatives
            .iter()
            .filter(|form| !is_null(form))
            .map(|form| self.expectation(form))
            .collect();
        words.join(", or ")
    }

    /// A value that is not what the schema demands.
    fn misfit(&mut self, schema: &'w Value, found: String) {
        let expected = self.lazily(|validator| validator.expectation(schema));
        self.report(ProblemKind::Invalid, found).expected(expected);
    }

    /// Words for a problem, unless it is only counted.
    fn lazily(&self, words: impl FnOnce(&Self) -> String) -> String {
        if self.findings.full() {
            String::new()
        } else {
            words(self)
        }
    }

    fn report(&mut self, kind: ProblemKind, found: impl Into<String>) -> Report<'_> {
        self.findings.add(kind, &self.at, found)
    }

    /// Does it with the path one step deeper.
    fn within<T>(&mut self, step: impl FnOnce(&mut String), act: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.at.path.len();
        step(&mut self.at.path);
        let done = act(self);
        self.at.path.truncate(outer);
        done
    }
}

fn strings(value: Option<&Value>) -> impl Iterator<Item = &str> {
    value
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

/// The fixed set of names that a schema allows, if it is of that sort.
fn names(schema: &Value) -> Option<Vec<&str>> {
    match (schema.get("const").and_then(Value::as_str), schema.get("enum")) {
        (Some(name), _) => Some(vec![name]),
        (None, names @ Some(_)) => Some(strings(names).collect()),
        (None, None) => None,
    }
}

/// The types that a schema allows; `None` for any.
fn types(schema: &Value) -> Option<impl Iterator<Item = &str>> {
    let types = schema.get("type")?;
    Some(types.as_str().into_iter().chain(strings(Some(types))))
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

fn is_null(schema: &Value) -> bool {
    schema.get("type").and_then(Value::as_str) == Some("null")
}

/// The value that a form demands for a member.
fn tag_of<'w>(form: &'w Value, member: &str) -> Option<&'w str> {
    form.get("properties")?.get(member)?.get("const")?.as_str()
}

/// The member by whose value the forms are told apart, if there is one, with the values in the forms' order.
fn tag<'w>(alternatives: &[&'w Value]) -> Option<(&'w str, Vec<&'w str>)> {
    let members = alternatives
        .iter()
        .filter_map(|form| form.get("properties")?.as_object())
        .flatten();
    let tag = members
        .filter(|(_, schema)| schema.get("const").is_some())
        .map(|(name, _)| name)
        .next()?;
    Some((
        tag,
        alternatives.iter().filter_map(|form| tag_of(form, tag)).collect(),
    ))
}

/// A found value in words.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(text) => format!("{:?}", shorten(text)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// A found value as it is written, if it is short.
fn describe_all(value: &Value) -> String {
    match value {
        Value::Array(list) if list.len() > 8 => "a list".to_owned(),
        Value::Object(members) if members.len() > 8 => "an object".to_owned(),
        Value::Array(_) | Value::Object(_) => shorten(&value.to_string()),
        other => describe(other),
    }
}
