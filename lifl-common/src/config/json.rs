//! JSON text to a value, with the one thing reported that `serde_json::Value` swallows: a key given twice.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::problem::{push_index, push_key, shorten};

/// Keys given twice that are reported; a file with more is beyond this help.
const KEPT: usize = 100;

/// Characters around a fault that are looked at to tell what it is.
const WORD_BYTES: usize = 16;

/// Why a file is not JSON.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotJson {
    /// What it is, and where.
    pub(super) found: String,
    /// What would have been right.
    pub(super) expected: Option<&'static str>,
}

impl NotJson {
    fn new(found: impl Into<String>, expected: &'static str) -> Self {
        Self {
            found: found.into(),
            expected: Some(expected),
        }
    }
}

/// The value, and the paths of keys given twice (of which the last counts). A byte-order mark in front is passed over.
///
/// # Errors
/// If the file is not JSON in UTF-8, or nested deeper than 128 levels.
pub(super) fn parse(file: &[u8]) -> Result<(Value, Vec<String>), NotJson> {
    let text = file.strip_prefix(b"\xef\xbb\xbf").unwrap_or(file);
    if let Some(other) = other_than_json(text) {
        return Err(other);
    }
    if let Err(error) = std::str::from_utf8(text) {
        let at = error.valid_up_to();
        let (line, column) = line_and_column(text, at);
        return Err(NotJson::new(
            format!("not UTF-8 at {line}:{column}: the byte {:#04x}", text[at]),
            "JSON in UTF-8: save the file in that encoding",
        ));
    }
    let state = RefCell::default();
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = Node(&state)
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| explain(text, &error))?;
    Ok((value, state.into_inner().twice))
}

/// What a file is that is not text in UTF-8, or no JSON at all.
fn other_than_json(text: &[u8]) -> Option<NotJson> {
    let utf_8 = "JSON in UTF-8: save the file in that encoding (PowerShell: Out-File -Encoding utf8)";
    match text {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => return Some(NotJson::new("UTF-32 text", utf_8)),
        // Without a mark: the first character of JSON is an ASCII one.
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, 1..=255, ..] | [1..=255, 0, ..] => {
            return Some(NotJson::new("UTF-16 text", utf_8));
        }
        [0x1f, 0x8b, ..] => return Some(NotJson::new("gzip data", "JSON: unpack the file (gunzip)")),
        [b'P', b'K', 3, 4, ..] => {
            return Some(NotJson::new("a zip archive", "JSON: unpack the file (unzip)"));
        }
        _ => {}
    }
    let begins = |prefix: &[u8]| {
        text.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    let text = text.trim_ascii_start();
    if text.is_empty() {
        return Some(NotJson::new("an empty file", "JSON"));
    }
    if begins(b"version https://git-lfs") {
        return Some(NotJson::new(
            "a Git LFS pointer in place of the file",
            "JSON: fetch it with `git lfs pull`",
        ));
    }
    text.starts_with(b"<").then(|| {
        NotJson::new(
            "an HTML or XML page",
            "JSON: what was downloaded is perhaps a login or an error page",
        )
    })
}

/// What a syntax error comes of, as far as what stands there tells.
fn explain(text: &[u8], error: &serde_json::Error) -> NotJson {
    let (line, column) = (error.line(), error.column());
    let start = text
        .split_inclusive(|byte| *byte == b'\n')
        .take(line.saturating_sub(1));
    let at = start.map(<[u8]>::len).sum::<usize>() + column.saturating_sub(1);
    let here = text.get(at).copied().unwrap_or(b' ');
    let in_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'+' | b'.');
    let before = text[..at.min(text.len())]
        .iter()
        .rev()
        .take(WORD_BYTES)
        .take_while(|byte| in_word(byte))
        .count();
    let word = &text[(at - before).min(text.len())..];
    let word = &word[..word
        .iter()
        .take(2 * WORD_BYTES)
        .take_while(|byte| in_word(byte))
        .count()];
    let is = |words: &[&str]| {
        words
            .iter()
            .any(|other| word.eq_ignore_ascii_case(other.as_bytes()))
    };
    let message = error.to_string();
    let cause = message
        .strip_suffix(&format!(" at line {line} column {column}"))
        .unwrap_or(&message);
    let (what, expected) = if error.is_eof() {
        (
            "the file ends within a value",
            Some("whole JSON: it may have been cut off"),
        )
    } else if cause == "recursion limit exceeded" {
        ("nested deeper than 128 levels", None)
    } else if cause == "number out of range" {
        ("a number larger than a 64-bit float can be", None)
    } else if is(&[
        "nan",
        "inf",
        "infinity",
        "-nan",
        "-inf",
        "-infinity",
        "+inf",
        "+infinity",
    ]) {
        (
            "NaN or infinity, which JSON does not have",
            Some("a number, or no such field"),
        )
    } else if is(&["none", "undefined"]) {
        ("a word that JSON does not have", Some("null, or no such field"))
    } else if is(&["true", "false"]) {
        ("true and false are written in small letters", None)
    } else if here == b'/' || here == b'#' {
        (
            "a comment, which JSON does not have",
            Some("none; a field whose name begins with // is passed over"),
        )
    } else if here == b'\'' {
        ("a single quote", Some("double quotes around names and strings"))
    } else if cause == "key must be a string" && in_word(&here) {
        (
            "a name without quotes",
            Some("double quotes around names and strings"),
        )
    } else if cause.starts_with("trailing comma") {
        ("trailing comma", Some("no comma before ] or }"))
    } else {
        (cause, None)
    };
    NotJson {
        found: format!("not JSON at {line}:{column}: {}", shorten(what)),
        expected,
    }
}

/// Where a byte of the text is; both count from 1.
fn line_and_column(text: &[u8], at: usize) -> (usize, usize) {
    let before = &text[..at];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    (line, column)
}

/// The whole number that a number is, `1.0` and `1e1` too, as in JSON Schema.
pub(super) fn whole(value: &Value) -> Option<Number> {
    /// From here on not every whole number is a float.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) if number.is_u64() || number.is_i64() => Some(number.clone()),
        Value::Number(number) => {
            let float = number
                .as_f64()
                .filter(|float| float.fract() == 0.0 && float.abs() <= EXACT)?;
            Some(if float < 0.0 {
                Number::from(float as i64)
            } else {
                Number::from(float as u64)
            })
        }
        _ => None,
    }
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
        for text in ["", "{", "[1,]", "{} {}", "{\"a\":1e999}", &"[".repeat(100_000)] {
            parse(text.as_bytes()).expect_err(text.get(..20).unwrap_or(text));
        }
    }

    #[test]
    fn a_byte_order_mark_is_passed_over_and_other_encodings_are_named() {
        let (value, _) = parse(b"\xef\xbb\xbf{\"a\": 1}\r\n").expect("JSON");
        assert_eq!(value["a"], 1);
        let utf_16: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let utf_16_be: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_be_bytes).collect();
        for (file, what) in [
            (&utf_16[..], "UTF-16"),
            (&utf_16_be, "UTF-16"),
            (&[b"\xff\xfe", &utf_16[..]].concat(), "UTF-16"),
            (&[b"\xfe\xff", &utf_16_be[..]].concat(), "UTF-16"),
            (b"\xff\xfe\0\0{\0\0\0", "UTF-32"),
            (b"{\n \"a\": \"caf\xe9\"}", "not UTF-8 at 2:11: the byte 0xe9"),
            (b" \r\n", "empty"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b"<!DOCTYPE html><html>", "HTML"),
            (b"\x1f\x8b\x08", "gzip"),
        ] {
            let error = parse(file).expect_err(what);
            assert!(error.found.contains(what), "{error:?}, not {what}");
            assert!(error.expected.is_some(), "{error:?}");
        }
    }

    #[test]
    fn what_people_write_that_is_not_json_is_named_with_its_place() {
        for (text, found) in [
            ("{\"a\": [1,\n]}", "2:1: trailing comma"),
            ("{\"a\": 1,}", "1:9: trailing comma"),
            ("{\n// one\n\"a\": 1}", "2:1: a comment"),
            ("{\"a\": 1 # one\n}", "1:9: a comment"),
            ("{\"a\": 1} // one", "1:10: a comment"),
            ("{\"a\": NaN}", "NaN or infinity"),
            ("{\"a\": nan}", "NaN or infinity"),
            ("{\"a\": -Infinity}", "NaN or infinity"),
            ("{\"a\": None}", "a word that JSON does not have"),
            ("{\"a\": True}", "small letters"),
            ("{'a': 1}", "1:2: a single quote"),
            ("{a: 1}", "1:2: a name without quotes"),
            ("{\"a\": 1e999}", "64-bit float"),
            ("{\"a\": [1, 2", "the file ends"),
            (&"[".repeat(1000), "128 levels"),
            ("{} {}", "trailing characters"),
        ] {
            let error = parse(text.as_bytes()).expect_err(text);
            assert!(
                error.found.starts_with("not JSON at ") && error.found.contains(found),
                "{error:?}, not {found}"
            );
        }
    }

    #[test]
    fn a_whole_number_may_have_a_point_or_an_exponent() {
        let whole =
            |text: &str| whole(&serde_json::from_str(text).expect("JSON")).map(|number| number.to_string());
        for (text, number) in [
            ("3", "3"),
            ("3.0", "3"),
            ("1e1", "10"),
            ("-2.0", "-2"),
            ("-0.0", "0"),
            ("18446744073709551615", "18446744073709551615"),
        ] {
            assert_eq!(whole(text).as_deref(), Some(number));
        }
        for text in ["1.5", "1e300", "18446744073709551616", "\"3\"", "true"] {
            assert_eq!(whole(text), None, "{text}");
        }
    }
}
