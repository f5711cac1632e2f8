//! Files that describe one worker twice, for one transport each: a run takes one of them.
//!
//! Flame's examples hold a `config_shm_1.json` beside a `config_p2p_1.json`, with other taskids. Files of a role are
//! variants of one worker if their transports differ on some channel for models, and
//!
//! 1. their paths are the same but for the name of a transport, or else
//! 2. their taskids are the same, or else
//! 3. they are in the same groups, and there are as many of each transport: then the first of one is the first of the
//!    other, and so on.

use std::collections::{BTreeMap, BTreeSet};

use super::document::{Document, FileKind};
use super::draft;
use super::flame_support;
use super::problem::{Findings, ProblemKind, shorten};
use super::spec::Transport;

/// Channels for models, each with its transport.
type Transports<'d> = BTreeMap<&'d str, Transport>;

/// A worker file that may have variants.
struct Candidate<'d> {
    /// Its place among the documents.
    index: usize,
    role: &'d str,
    task_id: &'d str,
    document: &'d Document,
    transports: Transports<'d>,
}

/// The documents that count: of each worker's variants the one with the preferred transport. `None` if that cannot
/// be said, which is reported; everything that follows depends on it.
pub(super) fn choose<'d>(
    documents: &'d [Document],
    prefer: Option<Transport>,
    findings: &mut Findings,
) -> Option<Vec<&'d Document>> {
    let sets = sets(documents);
    let mut dropped: BTreeSet<usize> = BTreeSet::new();
    let before = findings.count();
    for set in &sets {
        match chosen(set, prefer) {
            Some(chosen) => {
                dropped.extend(set.iter().map(|file| file.index).filter(|&index| index != chosen))
            }
            None => report(set, prefer, findings),
        }
    }
    if findings.count() > before {
        return None;
    }
    Some(
        documents
            .iter()
            .enumerate()
            .filter(|(index, _)| !dropped.contains(index))
            .map(|(_, document)| document)
            .collect(),
    )
}

/// The files that are variants of each other, two or more in a set, in the order of their first.
fn sets(documents: &[Document]) -> Vec<Vec<Candidate<'_>>> {
    let candidates = documents
        .iter()
        .enumerate()
        .filter(|(_, document)| document.kind == FileKind::Worker)
        .filter_map(|(index, document)| {
            Some(Candidate {
                index,
                role: document.raw.role.as_deref()?,
                task_id: document.raw.taskid.as_deref()?,
                document,
                transports: transports(document),
            })
        })
        .filter(|candidate| !candidate.transports.is_empty());
    let mut sets: Vec<Vec<Candidate>> = Vec::new();
    let mut left: Vec<Candidate> = Vec::new();
    let by_path = |candidate: &Candidate| {
        let (path, named) = without_transport(candidate.document);
        named.then(|| (candidate.role.to_owned(), path))
    };
    split(candidates.collect(), by_path, &mut sets, &mut left);
    let by_task_id = |candidate: &Candidate| Some((candidate.role.to_owned(), candidate.task_id.to_owned()));
    let mut rest = Vec::new();
    split(left, by_task_id, &mut sets, &mut rest);
    in_order(rest, &mut sets);
    sets.sort_by_key(|set| set[0].index);
    sets
}

/// Puts files with the same key into a set, if their transports differ; all others are left.
fn split<'d, K: Ord>(
    candidates: Vec<Candidate<'d>>,
    key: impl Fn(&Candidate<'d>) -> Option<K>,
    sets: &mut Vec<Vec<Candidate<'d>>>,
    left: &mut Vec<Candidate<'d>>,
) {
    let mut by_key: BTreeMap<K, Vec<Candidate>> = BTreeMap::new();
    for candidate in candidates {
        match key(&candidate) {
            Some(key) => by_key.entry(key).or_default().push(candidate),
            None => left.push(candidate),
        }
    }
    for files in by_key.into_values() {
        if files.len() > 1 && all_differ(&files) {
            sets.push(files);
        } else {
            left.extend(files);
        }
    }
    left.sort_by_key(|candidate| candidate.index);
}

/// Pairs the first files of each transport, the second ones, and so on, of each role and groups.
fn in_order<'d>(candidates: Vec<Candidate<'d>>, sets: &mut Vec<Vec<Candidate<'d>>>) {
    type Place<'d> = (&'d str, Option<&'d BTreeMap<String, String>>);
    let mut places: BTreeMap<Place, BTreeMap<Transports, Vec<Candidate>>> = BTreeMap::new();
    for candidate in candidates {
        let place = (candidate.role, candidate.document.raw.group_association.as_ref());
        let kinds = places.entry(place).or_default();
        kinds
            .entry(candidate.transports.clone())
            .or_default()
            .push(candidate);
    }
    for kinds in places.into_values() {
        let mut columns: Vec<_> = kinds.into_values().map(Vec::into_iter).collect();
        let count = columns[0].len();
        if columns.len() < 2 || columns.iter().any(|column| column.len() != count) {
            continue;
        }
        for _ in 0..count {
            let mut set: Vec<Candidate> = columns.iter_mut().filter_map(Iterator::next).collect();
            set.sort_by_key(|candidate| candidate.index);
            if all_differ(&set) {
                sets.push(set);
            }
        }
    }
}

/// Whether no two of the files mean the same transports, and they are of the same channels.
fn all_differ(files: &[Candidate]) -> bool {
    let kinds: BTreeSet<&Transports> = files.iter().map(|file| &file.transports).collect();
    let of_first = |file: &Candidate| file.transports.keys().eq(files[0].transports.keys());
    kinds.len() == files.len() && files.iter().all(of_first)
}

/// The file of a set on most of whose channels the transport is the preferred one.
fn chosen(set: &[Candidate], prefer: Option<Transport>) -> Option<usize> {
    let prefer = prefer?;
    let count = |file: &Candidate| file.transports.values().filter(|&&own| own == prefer).count();
    let most = set.iter().map(count).max().filter(|&most| most > 0)?;
    let mut best = set.iter().filter(|file| count(file) == most);
    let first = best.next()?;
    best.next().is_none().then_some(first.index)
}

/// Says that a choice is needed, or that it does not choose.
fn report(set: &[Candidate], prefer: Option<Transport>, findings: &mut Findings) {
    let files: Vec<String> = set
        .iter()
        .map(|file| {
            let names: BTreeSet<&str> = file
                .transports
                .values()
                .map(|transport| transport.name())
                .collect();
            let names: Vec<&str> = names.into_iter().collect();
            format!("{} ({})", file.document.place.file_name(), names.join(", "))
        })
        .collect();
    let found = format!(
        "variants of one {}: {}",
        shorten(set[0].role),
        files.join(" and ")
    );
    let choices: BTreeSet<Transport> = set
        .iter()
        .flat_map(|file| file.transports.values().copied())
        .filter(|&transport| chosen(set, Some(transport)).is_some())
        .collect();
    let choices: Vec<String> = choices
        .iter()
        .map(|choice| format!("--prefer {choice}"))
        .collect();
    let expected = match (choices.is_empty(), prefer) {
        (true, _) => "only one of them".to_owned(),
        (false, None) => format!("a choice: pass {}, or only one of them", choices.join(" or ")),
        (false, Some(prefer)) => format!(
            "one with {prefer}, as --prefer says: pass {}, or only one of them",
            choices.join(" or ")
        ),
    };
    findings
        .add(ProblemKind::Conflict, &set[set.len() - 1].document.place, found)
        .expected(expected);
}

/// The transports of a file's channels for models.
fn transports(document: &Document) -> Transports<'_> {
    let channels = document.raw.channels.iter().flatten().enumerate();
    channels
        .filter(|(_, channel)| !channel.coordinates())
        .map(|(i, channel)| {
            let place = document.at("channels").index(i);
            (
                channel.name.as_str(),
                draft::transport(channel, &place, document).0,
            )
        })
        .collect()
}

/// A file's path without the names of transports that stand in it as words, and whether there were any.
fn without_transport(document: &Document) -> (String, bool) {
    let path = document.place.file_name();
    let mut named = false;
    let words: Vec<&str> = path
        .split_inclusive(|c: char| !c.is_ascii_alphanumeric())
        .map(|word| {
            let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
            if flame_support::transport(&bare.to_ascii_lowercase()).is_some() {
                named = true;
                &word[bare.len()..]
            } else {
                word
            }
        })
        .collect();
    (words.concat(), named)
}
