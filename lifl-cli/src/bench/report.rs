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
        tables(&self.results)
            .iter()
            .try_for_each(|table| outln!("{table}"))
    }
}

/// The most characters of a table's line.
const MOST_WIDTH: usize = 100;

/// One column of a table, with a cell for each result.
struct Column {
    heading: String,
    cells: Vec<String>,
}

impl Column {
    fn new(heading: &str, results: &[Measured], cell: impl Fn(&Measured) -> Option<String>) -> Self {
        Self {
            heading: heading.to_owned(),
            cells: results
                .iter()
                .map(|result| cell(result).unwrap_or_default())
                .collect(),
        }
    }

    fn is_empty(&self) -> bool {
        self.cells.iter().all(String::is_empty)
    }

    /// With the line and the spaces beside it.
    fn width(&self) -> usize {
        let texts = self.cells.iter().chain([&self.heading]);
        3 + texts.map(|text| text.chars().count()).max().unwrap_or(0)
    }
}

/// The results as lines of text: what all cases have in common, and as many tables below each other as have all columns,
/// each with the cases.
fn tables(results: &[Measured]) -> Vec<String> {
    let (common, cases): (Vec<Column>, Vec<Column>) = keys(results, |result| result.case.as_object())
        .into_iter()
        .map(|key| {
            Column::new(heading(key), results, |result| {
                Some(plain(key, result.case.get(key)?))
            })
        })
        .partition(|column| results.len() > 1 && column.cells.iter().all(|cell| *cell == column.cells[0]));
    let mut lines = Vec::new();
    if !common.is_empty() {
        let common = common
            .iter()
            .map(|column| format!("{} {}", column.heading, column.cells[0]));
        lines.push(format!("\nall: {}", common.collect::<Vec<_>>().join(", ")));
    }
    let case_width = 1 + cases.iter().map(Column::width).sum::<usize>();
    let mut width = MOST_WIDTH;
    let mut groups: Vec<Vec<Column>> = Vec::new();
    for column in measured(results).into_iter().filter(|column| !column.is_empty()) {
        if width + column.width() > MOST_WIDTH {
            groups.push(Vec::new());
            width = case_width;
        }
        width += column.width();
        if let Some(group) = groups.last_mut() {
            group.push(column);
        }
    }
    for group in groups {
        let columns: Vec<&Column> = cases.iter().chain(&group).collect();
        let mut table = Table::new();
        table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(columns.iter().map(|column| &column.heading));
        for row in 0..results.len() {
            table.add_row(columns.iter().map(|column| &column.cells[row]));
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        lines.push(format!("\n{table}"));
    }
    lines
}

/// What was measured, in the order of its columns.
fn measured(results: &[Measured]) -> Vec<Column> {
    let time = |heading, of: fn(&Seconds) -> f64| {
        Column::new(heading, results, |result| Some(human_time(of(&result.seconds))))
    };
    let some_bytes = |bytes: u64| (bytes > 0).then(|| human_bytes(bytes));
    let mut columns = vec![
        time("median", |seconds| seconds.median),
        time("fastest", |seconds| seconds.min),
        time("99 % within", |seconds| seconds.p99),
        time("99.9 % within", |seconds| seconds.p999),
        Column::new("runs", results, |result| Some(result.seconds.runs.to_string())),
    ];
    for key in keys(results, |result| Some(&result.more)) {
        let value = |result: &Measured| result.more.get(key).cloned();
        if results
            .iter()
            .any(|result| value(result).is_some_and(|value| value.is_object()))
        {
            // The critical path: seconds by role.
            for role in keys(results, |result| result.more.get(key)?.as_object()) {
                columns.push(Column::new(&format!("{role} done"), results, |result| {
                    Some(plain("seconds", result.more.get(key)?.get(role)?))
                }));
            }
        } else {
            columns.push(Column::new(heading(key), results, |result| {
                Some(plain(key, &value(result)?))
            }));
        }
    }
    columns.extend([
        Column::new("data", results, |result| some_bytes(result.bytes_moved)),
        Column::new("of read speed", results, |result| {
            Some(format!("{:.0} %", result.share_of_read? * 100.0))
        }),
        Column::new("CPU time", results, |result| result.cpu_seconds.map(human_time)),
        Column::new("peak memory", results, |result| {
            some_bytes(result.peak_memory_bytes)
        }),
    ]);
    columns
}

/// The keys of all results, in the order in which they come first.
fn keys<'a>(
    results: &'a [Measured],
    object: impl Fn(&'a Measured) -> Option<&'a Map<String, Value>>,
) -> Vec<&'a str> {
    let mut keys: Vec<&str> = Vec::new();
    for key in results.iter().filter_map(object).flat_map(Map::keys) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    keys
}

/// What a table calls a field of the JSON line.
fn heading(key: &str) -> &str {
    match key {
        "bytes" => "size",
        "dtype" => "type",
        "stream" => "senders",
        "idle" => "idle process",
        "start" => "start of",
        "scratch_bytes" => "beside the slot",
        "round_trip_seconds" => "round trip",
        "round_trip_p99_seconds" => "trip, 99 %",
        "round_trip_p999_seconds" => "trip, 99.9 %",
        "times_bare" => "x bare",
        "frames_per_s" => "frames/s",
        "first_seconds" => "first round",
        "floor_seconds" => "memory's floor",
        "times_floor" => "x floor",
        "start_seconds" => "start",
        "planned_bytes" => "planned memory",
        "per_worker_seconds" => "per worker",
        "cpu_per_worker_seconds" => "CPU per worker",
        "bare_per_worker_seconds" => "per bare process",
        "wakeups_per_s" => "wake-ups/s",
        other => other,
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
            Some(rate) if name.ends_with("_per_s") && rate >= 100.0 => format!("{rate:.0}"),
            Some(share) if number.is_f64() => format!("{share:.2}"),
            _ => number.to_string(),
        },
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
    use serde_json::json;

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

    #[test]
    fn small_rates_keep_their_decimals() {
        let read = [0.4, 99.5, 123_456.7].map(|rate| plain("frames_per_s", &json!(rate)));
        assert_eq!(read, ["0.40", "99.50", "123457"]);
    }

    #[test]
    fn tables_are_narrow_and_have_plain_headings() {
        let result = |trainers: u32| Measured {
            bench: "round",
            case: json!({
                "bytes": 232_000_000, "dtype": "F32", "trainers": trainers, "levels": "8x4x2x1", "timing": "eager",
            }),
            seconds: Seconds::of(vec![0.1 * f64::from(trainers)]),
            bytes_moved: 1 << 33,
            share_of_read: Some(0.5),
            cpu_seconds: Some(0.25),
            peak_memory_bytes: 1 << 32,
            more: json!({
                "first_seconds": 0.5, "floor_seconds": 0.05, "times_floor": 2.0, "start_seconds": 0.75,
                "planned_bytes": 1_u64 << 33, "per_worker_seconds": 0.01, "frames_per_s": 123_456.7,
                "critical_path": { "leaf-aggregator": 0.01, "middle-aggregator": 0.02, "trainer": 0.03 },
            })
            .as_object()
            .expect("an object")
            .clone(),
        };
        let text = tables(&[result(4), result(8)]).join("\n");
        assert!(
            text.lines().all(|line| line.chars().count() <= MOST_WIDTH),
            "{text}"
        );
        assert!(!text.contains('_'), "{text}");
        assert!(
            text.contains("all: size 232 MB, type F32, levels 8x4x2x1, timing eager"),
            "{text}"
        );
        for cell in [
            "trainers",
            "400.00 ms",
            "800.00 ms",
            "leaf-aggregator done",
            "123457",
            "50 %",
            "8 GiB",
        ] {
            assert!(text.contains(cell), "no {cell} in\n{text}");
        }
        // A single result has its case in the table.
        let alone = tables(&[result(4)]).join("\n");
        assert!(!alone.contains("all:") && alone.contains("8x4x2x1"), "{alone}");
        assert!(
            alone.lines().all(|line| line.chars().count() <= MOST_WIDTH),
            "{alone}"
        );
    }
}
