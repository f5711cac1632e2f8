//! What is wrong with a person's files: collected, not thrown, so that one try shows all of it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::dataset::mask_all;

/// Problems kept; more are counted only, so that a hostile file cannot fill the memory with complaints.
const KEPT: usize = 1000;
/// Names longer than this are not compared with known ones: nobody misspells one of those.
const COMPARED_BYTES: usize = 64;
/// Known names that are considered for a hint, so that a file full of names cannot keep us busy.
const CONSIDERED: usize = 256;
/// Characters of a found value that are shown.
const SHOWN_CHARS: usize = 60;

/// All that is wrong with the files of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct ConfigError {
    /// Each problem, file by file; never empty.
    pub problems: Vec<Problem>,
    /// How many more there were.
    pub omitted: usize,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            fmt::Display::fmt(problem, f)?;
        }
        if self.omitted > 0 {
            write!(f, "\nand {} more problems", self.omitted)?;
        }
        Ok(())
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What sort of problem it is.
    pub kind: ProblemKind,
    /// The file; `None` for an override from the command line.
    #[serde(serialize_with = "display")]
    pub file: Option<PathBuf>,
    /// The JSON path in it, `roles[2].replica`; empty for the file as a whole.
    pub path: String,
    /// What was found there.
    pub found: String,
    /// What would have been right, or what is supported.
    pub expected: Option<String>,
    /// What the writer may have meant.
    pub hint: Option<String>,
}

/// The sorts of [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProblemKind {
    /// A file cannot be read, or is not JSON.
    Unreadable,
    /// A name that nothing here has.
    Unknown,
    /// Something needed is not there.
    Missing,
    /// A value of the wrong type, or out of range.
    Invalid,
    /// Two things that cannot both be.
    Conflict,
    /// Flame has it, this has not.
    Unsupported,
}

impl fmt::Display for Problem {
    /// `file: path: found; expected …`, or, where a name was misspelt, `…; did you mean …?`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}: ", file.display())?,
            None => f.write_str("override: ")?,
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.found)?;
        match (&self.hint, &self.expected, self.kind) {
            (Some(hint), ..) => write!(f, "; {hint}"),
            (None, Some(expected), ProblemKind::Unsupported) => write!(f, "; supported: {expected}"),
            (None, Some(expected), _) => write!(f, "; expected {expected}"),
            (None, None, _) => Ok(()),
        }
    }
}

/// A problem just recorded, to say more about. Of one that is only counted nothing more is worked out.
pub(super) struct Report<'f>(Option<&'f mut Problem>);

impl Report<'_> {
    /// What the writer should have written.
    pub(super) fn expected(self, expected: impl Into<String>) {
        if let Some(problem) = self.0 {
            problem.expected = Some(expected.into());
        }
    }

    /// The names that `name` could have been, and the nearest of them as the hint.
    pub(super) fn one_of<'n>(self, name: &str, known: impl IntoIterator<Item = &'n str>) {
        if let Some(problem) = self.0 {
            let known: Vec<&str> = known.into_iter().take(CONSIDERED).collect();
            problem.hint = nearest(name, &known).map(|near| format!("did you mean {near}?"));
            problem.expected = Some(list(&known));
        }
    }
}

/// serde refuses a path that is not UTF-8; a message need not.
fn display<S: Serializer>(file: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    file.as_ref()
        .map(|file| file.to_string_lossy())
        .serialize(serializer)
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The file; `None` for an override.
    pub(super) file: Option<Arc<Path>>,
    /// The JSON path in it.
    pub(super) path: String,
}

impl Place {
    /// The file as a whole.
    pub(super) fn file(file: &Arc<Path>) -> Self {
        Self {
            file: Some(Arc::clone(file)),
            path: String::new(),
        }
    }

    pub(super) fn overriding(name: &str) -> Self {
        Self {
            file: None,
            path: name.to_owned(),
        }
    }

    /// A member of the object here.
    pub(super) fn key(&self, key: &str) -> Self {
        let mut path = self.path.clone();
        push_key(&mut path, key);
        Self {
            file: self.file.clone(),
            path,
        }
    }

    /// An element of the list here.
    pub(super) fn index(&self, index: usize) -> Self {
        let mut path = self.path.clone();
        push_index(&mut path, index);
        Self {
            file: self.file.clone(),
            path,
        }
    }

    /// The file's name for a message.
    pub(super) fn file_name(&self) -> String {
        self.file
            .as_ref()
            .map_or_else(|| "an override".to_owned(), |file| file.display().to_string())
    }
}

/// Adds a member to a JSON path: `.name`, or `["a name"]` where a dot would mislead.
pub(super) fn push_key(path: &mut String, key: &str) {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '$');
    if !key.is_empty() && key.chars().all(plain) {
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(&shorten(key));
    } else {
        path.push_str(&format!("[{:?}]", shorten(key)));
    }
}

/// Adds an element to a JSON path.
pub(super) fn push_index(path: &mut String, index: usize) {
    path.push_str(&format!("[{index}]"));
}

/// Problems and notes as they are found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    problems: Vec<Problem>,
    omitted: usize,
    notes: Vec<String>,
}

impl Findings {
    /// Records a problem; say more about it on what is returned.
    pub(super) fn add(&mut self, kind: ProblemKind, place: &Place, found: impl Into<String>) -> Report<'_> {
        if self.full() {
            self.omitted += 1;
            return Report(None);
        }
        self.problems.push(Problem {
            kind,
            file: place.file.as_deref().map(Path::to_path_buf),
            path: place.path.clone(),
            found: found.into(),
            expected: None,
            hint: None,
        });
        Report(self.problems.last_mut())
    }

    /// Whether further problems are only counted.
    pub(super) fn full(&self) -> bool {
        self.problems.len() >= KEPT
    }

    /// Whether any problem was found.
    pub(super) fn any(&self) -> bool {
        !self.problems.is_empty()
    }

    /// How many problems were found.
    pub(super) fn count(&self) -> usize {
        self.problems.len() + self.omitted
    }

    /// Whether a problem was found at that place or within it: what is then odd there is only its consequence.
    pub(super) fn any_at(&self, place: &Place) -> bool {
        self.problems.iter().any(|problem| {
            problem.file.as_deref() == place.file.as_deref()
                && problem.path.strip_prefix(&place.path).is_some_and(|rest| {
                    rest.is_empty() || place.path.is_empty() || rest.starts_with(['.', '['])
                })
        })
    }

    /// Says something that is not wrong, once.
    pub(super) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// The notes, if there was no problem.
    ///
    /// # Errors
    /// If there was one.
    pub(super) fn into_notes(self) -> Result<Vec<String>, ConfigError> {
        if self.problems.is_empty() {
            return Ok(self.notes);
        }
        Err(ConfigError {
            problems: self.problems,
            omitted: self.omitted,
        })
    }
}

/// The known name nearest to `name`, if it is near enough to be a slip.
fn nearest<'n>(name: &str, known: &[&'n str]) -> Option<&'n str> {
    if name.is_empty() || name.len() > COMPARED_BYTES {
        return None;
    }
    let lower = name.to_lowercase();
    known
        .iter()
        .filter(|known| known.len() <= COMPARED_BYTES)
        .map(|&known| (strsim::damerau_levenshtein(&lower, &known.to_lowercase()), known))
        .filter(|&(distance, known)| distance <= (known.len().min(name.len()) / 3).max(1))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, known)| known)
}

/// `a, b or c`, cut when there are very many.
pub(super) fn list(names: &[&str]) -> String {
    const SHOWN: usize = 40;
    match names {
        [] => "nothing".to_owned(),
        [one] => shorten(one),
        names if names.len() > SHOWN => {
            let shown: Vec<String> = names[..SHOWN].iter().map(|name| shorten(name)).collect();
            format!("one of {}, …", shown.join(", "))
        }
        [rest @ .., last] => {
            let rest: Vec<String> = rest.iter().map(|name| shorten(name)).collect();
            format!("{} or {}", rest.join(", "), shorten(last))
        }
    }
}

/// Text from a file for a message: not endless, and without control characters that a terminal would obey.
pub(super) fn shorten(text: &str) -> String {
    let text = mask_all(text);
    let mut short: String = text
        .chars()
        .take(SHOWN_CHARS)
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect();
    if text.chars().nth(SHOWN_CHARS).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_gets_a_hint_and_another_word_none() {
        let known = ["rounds", "epochs", "batchSize", "learningRate"];
        assert_eq!(nearest("batchsize", &known), Some("batchSize"));
        assert_eq!(nearest("learning_rate", &known), Some("learningRate"));
        assert_eq!(nearest("round", &known), Some("rounds"));
        assert_eq!(nearest("momentum", &known), None);
        assert_eq!(nearest(&"x".repeat(1 << 20), &known), None);
    }

    #[test]
    fn a_path_reads_like_the_json_it_points_into() {
        let place = Place::file(&Arc::from(Path::new("a.json")));
        assert_eq!(
            place.key("roles").index(2).key("replica").path,
            "roles[2].replica"
        );
        assert_eq!(place.key("groups").key("a.b c").path, r#"groups["a.b c"]"#);
    }

    #[test]
    fn a_problem_within_a_place_is_at_it_and_a_longer_name_is_not() {
        let file = Place::file(&Arc::from(Path::new("a.json")));
        let mut findings = Findings::default();
        findings.add(ProblemKind::Invalid, &file.key("roles").index(1).key("name"), "5");
        assert!(findings.any_at(&file));
        assert!(findings.any_at(&file.key("roles")));
        assert!(findings.any_at(&file.key("roles").index(1)));
        assert!(!findings.any_at(&file.key("role")));
        assert!(!findings.any_at(&file.key("roles").index(10)));
    }

    #[test]
    fn what_a_hostile_file_can_make_us_say_is_bounded() {
        let file = Place::file(&Arc::from(Path::new("a.json")));
        let mut findings = Findings::default();
        for i in 0..KEPT + 5 {
            findings
                .add(ProblemKind::Invalid, &file.index(i), "no")
                .expected("yes");
        }
        let error = findings.into_notes().expect_err("problems");
        assert_eq!((error.problems.len(), error.omitted), (KEPT, 5));
        assert!(error.to_string().ends_with("and 5 more problems"));
        assert_eq!(shorten("a\u{1b}[31m"), "a\u{fffd}[31m");
    }
}
