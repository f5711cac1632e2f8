//! JSON text to a value, with the one thing reported that `serde_json::Value` swallows: a key given twice.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::problem::{push_index, push_key};

/// Keys given twice that are reported; a file with more is beyond this help.
const KEPT: usize = 100;

/// The value, and the paths of keys given twice (of which the last counts).
///
/// # Errors
/// If the text is not JSON, or nested deeper than 128 levels.
pub(super) fn parse(text: &[u8]) -> Result<(Value, Vec<String>), serde_json::Error> {
    let state = RefCell::default();
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = Node(&state).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok((value, state.into_inner().twice))
}

#[derive(Default)]
struct State {
    path: String,
    twice: Vec<String>,
}

/// The value at the state's path.
struct Node<'s>(&'s RefCell<State>);

impl Node<'_> {
    /// Reads a member, with the path as long as that lasts one step deeper.
    fn within<T>(&self, step: impl FnOnce(&mut String), read: impl FnOnce() -> T) -> T {
        let outer = self.0.borrow().path.len();
        step(&mut self.0.borrow_mut().path);
        let member = read();
        self.0.borrow_mut().path.truncate(outer);
        member
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = self.within(
            |path| push_index(path, list.len()),
            || elements.next_element_seed(Node(self.0)),
        )? {
            list.push(element);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            let member = self.within(
                |path| push_key(path, &key),
                || {
                    let mut state = self.0.borrow_mut();
                    if map.contains_key(&key) && state.twice.len() < KEPT {
                        let path = state.path.clone();
                        state.twice.push(path);
                    }
                    drop(state);
                    members.next_value_seed(Node(self.0))
                },
            )?;
            map.insert(key, member);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        let text = br#"{"a":[1,-2,0.5,true,null,"x\u00e9"],"b":{"c":{}},"big":18446744073709551615}"#;
        let (value, twice) = parse(text).expect("JSON");
        assert_eq!(value, serde_json::from_slice::<Value>(text).expect("JSON"));
        assert!(twice.is_empty());
    }

    #[test]
    fn tells_of_keys_given_twice() {
        let (_, twice) = parse(br#"{"a":[{"b":1},{"b":1,"b":2}],"a":3}"#).expect("JSON");
        assert_eq!(twice, ["a[1].b", "a"]);
    }

    #[test]
    fn refuses_what_is_not_json() {
        for text in [
            "",
            "{",
            "[1,]",
            "{} {}",
            "{\"a\":1e999}",
            &"[".repeat(100_000),
            "\u{feff}{}",
        ] {
            parse(text.as_bytes()).expect_err(text.get(..20).unwrap_or(text));
        }
    }
}
