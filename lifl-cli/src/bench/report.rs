//! What a bench says: a line of JSON for each result, or one table at its end.

use std::cell::RefCell;
use std::time::Duration;

use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::coordinate::report::human_bytes;
use crate::exit::{Failure, Outcome};
use crate::output::{self, outln};

use super::Scene;

/// Durations of one thing, done often.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Seconds {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
    pub(super) runs: usize,
}

impl Seconds {
    /// Of at least one duration.
    pub(super) fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        // The nearest rank.
        let at = |share: f64| {
            let rank = (share * seconds.len() as f64).ceil() as usize;
            seconds[rank.clamp(1, seconds.len()) - 1]
        };
        Self {
            median: at(0.5),
            min: at(0.0),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
            runs: seconds.len(),
        }
    }
}

/// One result.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) bench: &'static str,
    /// What was measured.
    pub(super) case: Value,
    pub(super) seconds: Seconds,
    /// Bytes that such a run has to move, as the bench's module counts them.
    pub(super) bytes_moved: u64,
    /// `bytes_moved` in the median, as a share of what the memory can be read at.
    pub(super) share_of_read: Option<f64>,
    /// User and system time of a run, of all processes that take part; `None` where that was not measured.
    pub(super) cpu_seconds: Option<f64>,
    /// The most that those processes had, private and shared.
    pub(super) peak_memory_bytes: u64,
    /// What only this bench has.
    #[serde(flatten)]
    pub(super) more: Map<String, Value>,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line<'a> {
    Memory {
        threads: usize,
        read_bytes_per_second: f64,
    },
    Bench(&'a Measured),
    Skipped {
        bench: &'static str,
        case: &'a Value,
        why: &'a str,
    },
}

/// Where results go.
pub(super) struct Reporter<'a> {
    json: bool,
    results: Vec<Measured>,
    /// Is cut when results cannot be written: then none is measured any more.
    scene: &'a Scene,
    unwritten: RefCell<Option<Failure>>,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(json: bool, scene: &'a Scene) -> Self {
        Self {
            json,
            results: Vec::new(),
            scene,
            unwritten: RefCell::default(),
        }
    }

    /// Notes that a result could not be written, if so.
    fn wrote(&self, written: Outcome) {
        if let Err(failure) = written {
            self.scene.cut();
            self.unwritten.borrow_mut().get_or_insert(failure);
        }
    }

    fn line(&self, line: &Line<'_>) {
        if self.json
            && let Ok(line) = serde_json::to_string(line)
        {
            self.wrote(outln!("{line}"));
        }
    }

    /// What the memory can be read at.
    pub(super) fn memory(&self, threads: usize, read_bytes_per_second: f64) {
        self.line(&Line::Memory {
            threads,
            read_bytes_per_second,
        });
        if !self.json {
            self.wrote(outln!(
                "memory: {:.1} GB/s read with {threads} thread(s)",
                read_bytes_per_second / 1e9
            ));
        }
    }

    /// A result.
    pub(super) fn result(&mut self, measured: Measured) {
        self.line(&Line::Bench(&measured));
        // The table comes last: until then this shows that it goes on.
        output::log().line(format!(
            "{} {}: {}\n",
            measured.bench,
            flat(&measured.case),
            human_time(measured.seconds.median)
        ));
        self.results.push(measured);
    }

    /// What cannot be measured here.
    pub(super) fn skipped(&self, bench: &'static str, case: &Value, why: &str) {
        self.line(&Line::Skipped { bench, case, why });
        output::log().line(format!("{bench} {}: NOT MEASURED: {why}\n", flat(case)));
    }

    /// Prints the table.
    ///
    /// # Errors
    /// If that, or a result before it, cannot be written.
    pub(super) fn end(self) -> Outcome {
        if let Some(failure) = self.unwritten.into_inner() {
            return Err(failure);
        }
        if self.json || self.results.is_empty() {
            return Ok(());
        }
        let mut columns: Vec<(String, Column)> = Vec::new();
        for result in &self.results {
            for key in result.case.as_object().into_iter().flat_map(Map::keys) {
                add(&mut columns, key, Column::Case);
            }
        }
        let fixed = [
            "median",
            "min",
            "p99",
            "p99.9",
            "runs",
            "moved",
            "of read",
            "CPU",
            "peak memory",
        ];
        columns.extend(fixed.map(|name| (name.to_owned(), Column::Fixed)));
        for result in &self.results {
            for key in result.more.keys() {
                add(&mut columns, key, Column::More);
            }
        }
        let mut table = Table::new();
        table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(columns.iter().map(|(name, _)| name));
        for result in &self.results {
            table.add_row(columns.iter().map(|(name, column)| cell(result, name, *column)));
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        outln!("{table}")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Case,
    Fixed,
    More,
}

fn add(columns: &mut Vec<(String, Column)>, name: &str, column: Column) {
    if !columns
        .iter()
        .any(|(known, sort)| known == name && *sort == column)
    {
        columns.push((name.to_owned(), column));
    }
}

fn cell(result: &Measured, name: &str, column: Column) -> String {
    let seconds = &result.seconds;
    match (column, name) {
        (Column::Case, _) => result
            .case
            .get(name)
            .map_or(String::new(), |value| plain(name, value)),
        (Column::More, _) => result
            .more
            .get(name)
            .map_or(String::new(), |value| plain(name, value)),
        (_, "median") => human_time(seconds.median),
        (_, "min") => human_time(seconds.min),
        (_, "p99") => human_time(seconds.p99),
        (_, "p99.9") => human_time(seconds.p999),
        (_, "runs") => seconds.runs.to_string(),
        (_, "moved") => human_bytes(result.bytes_moved),
        (_, "of read") => result
            .share_of_read
            .map_or(String::new(), |share| format!("{share:.2}")),
        (_, "CPU") => result.cpu_seconds.map_or(String::new(), human_time),
        _ => human_bytes(result.peak_memory_bytes),
    }
}

/// A value as people read it; the name tells its unit.
fn plain(name: &str, value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64() {
            Some(seconds) if name.ends_with("seconds") => human_time(seconds),
            Some(bytes) if name.ends_with("bytes") && name != "bytes" => human_bytes(bytes as u64),
            Some(bytes) if name == "bytes" => format!("{} MB", bytes / 1e6),
            Some(share) if number.is_f64() => format!("{share:.2}"),
            _ => number.to_string(),
        },
        // The critical path: seconds by role.
        Value::Object(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|(key, value)| format!("{key} {}", plain("seconds", value)))
                .collect();
            fields.join(", ")
        }
        other => other.to_string(),
    }
}

fn flat(case: &Value) -> String {
    let fields = case.as_object().into_iter().flatten();
    let fields: Vec<String> = fields
        .map(|(key, value)| format!("{key} {}", plain(key, value)))
        .collect();
    fields.join(", ")
}

fn human_time(seconds: f64) -> String {
    let nanos = Duration::try_from_secs_f64(seconds)
        .unwrap_or_default()
        .as_nanos();
    match nanos {
        0..1_000 => format!("{:.0} ns", seconds * 1e9),
        1_000..1_000_000 => format!("{:.1} µs", seconds * 1e6),
        1_000_000..1_000_000_000 => format!("{:.2} ms", seconds * 1e3),
        _ => format!("{seconds:.3} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let seconds = Seconds::of((1..=1000).rev().map(f64::from).collect());
        assert_eq!((seconds.min, seconds.median, seconds.max), (1.0, 500.0, 1000.0));
        assert_eq!((seconds.p99, seconds.p999, seconds.runs), (990.0, 999.0, 1000));
        let one = Seconds::of(vec![2.0]);
        assert_eq!((one.min, one.median, one.p999), (2.0, 2.0, 2.0));
    }

    #[test]
    fn times_read_well() {
        let read = [0.0, 2.5e-7, 3.25e-6, 0.0415, 2.0].map(human_time);
        assert_eq!(read, ["0 ns", "250 ns", "3.2 µs", "41.50 ms", "2.000 s"]);
    }
}
