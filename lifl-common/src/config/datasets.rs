//! Which worker has which dataset, where `dataSpec.json` and `dataset*.json` say so.
//!
//! `dataSpec.json` names datasets by the ids that Flame's database gave them, and Flame's own dataset files have no
//! ids. So an id finds its file
//!
//! 1. by the file's `id`, or by the file's name, or, as an URL, needs none;
//! 2. else, if as many files are left as ids, by the file's `realm`, where that names a group for each;
//! 3. else in the order of the files' names, numbers in them by their value.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::draft::{DEFAULT_GROUP, Rounds, WorkerDraft};
use super::problem::{Findings, Place, ProblemKind, list, shorten};
use super::raw::Role;
use super::raw_control_plane::{Dataset, RoleData};

/// A worker of a role that gets data.
#[derive(Debug, Clone)]
pub(super) struct Assigned {
    pub(super) role: String,
    /// The group that it is in on one of its channels.
    pub(super) group: String,
    pub(super) url: String,
    /// Where the group is named.
    pub(super) place: Place,
    /// Where the URL stands.
    pub(super) url_place: Place,
}

/// An id of `dataSpec.json`, where it stands.
struct Wanted<'d> {
    role: &'d str,
    group: &'d str,
    id: &'d str,
    place: Place,
}

/// Finds each worker's dataset. What is missing or cannot be told apart is reported.
pub(super) fn assign(
    roles: &[(RoleData, Place)],
    mut files: Vec<(Dataset, Place)>,
    data_spec: &Place,
    findings: &mut Findings,
) -> Vec<Assigned> {
    files.sort_by(|(_, a), (_, b)| natural(&a.file_name(), &b.file_name()));
    let wanted = wanted(roles, findings);
    let mut found: BTreeMap<&str, (String, Place)> = BTreeMap::new();
    let mut used: BTreeSet<usize> = BTreeSet::new();
    let mut left: Vec<&Wanted> = Vec::new();
    for want in &wanted {
        if found.contains_key(want.id) || left.iter().any(|other| other.id == want.id) {
            continue;
        }
        let by_name = |(dataset, place): &(Dataset, Place)| match &dataset.id {
            Some(id) => id == want.id,
            None => place
                .file
                .as_deref()
                .and_then(Path::file_stem)
                .is_some_and(|stem| stem == want.id),
        };
        if let Some(index) = files.iter().position(by_name) {
            used.insert(index);
            let (dataset, place) = &files[index];
            found.insert(want.id, (dataset.url.clone(), place.key("url")));
        } else if want.id.contains("://") || want.id.starts_with("builtin:") {
            found.insert(want.id, (want.id.to_owned(), want.place.clone()));
        } else {
            left.push(want);
        }
    }
    let unused: Vec<&(Dataset, Place)> = files
        .iter()
        .enumerate()
        .filter(|(index, _)| !used.contains(index))
        .map(|(_, file)| file)
        .collect();
    if left.is_empty() {
        if !unused.is_empty() && !wanted.is_empty() {
            findings.note(format!(
                "{} dataset files are not used: dataSpec does not name them",
                unused.len()
            ));
        }
    } else if left.len() == unused.len() {
        match by_realm(&left, &unused) {
            Some(pairs) => {
                findings.note(
                    "the ids in dataSpec are those of Flame's database: datasets are taken by the group that their \
                     realm names",
                );
                found.extend(pairs);
            }
            None => {
                findings.note(
                    "the ids in dataSpec are those of Flame's database: datasets are taken in the order of their \
                     files' names",
                );
                let pairs = left.iter().zip(&unused);
                found.extend(
                    pairs.map(|(want, (dataset, place))| (want.id, (dataset.url.clone(), place.key("url")))),
                );
            }
        }
    } else {
        let ids: Vec<&str> = left.iter().map(|want| want.id).collect();
        let problem = findings.add(
            ProblemKind::Missing,
            data_spec,
            format!(
                "{} datasets named that no file has as its id ({}), and {} dataset files left",
                left.len(),
                list(&ids),
                unused.len()
            ),
        );
        problem.expected("a dataset*.json for each, in the order of their names, or each with its id");
    }
    wanted
        .iter()
        .filter_map(|want| {
            let (url, url_place) = found.get(want.id)?.clone();
            Some(Assigned {
                role: want.role.to_owned(),
                group: want.group.to_owned(),
                url,
                place: want.place.clone(),
                url_place,
            })
        })
        .collect()
}

/// All ids, by role in file order, then by group and in the group's order, which is the order of the workers.
fn wanted<'d>(roles: &'d [(RoleData, Place)], findings: &mut Findings) -> Vec<Wanted<'d>> {
    let mut wanted = Vec::new();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for (role, place) in roles {
        if !seen.insert(&role.role) {
            findings
                .add(
                    ProblemKind::Conflict,
                    &place.key("role"),
                    format!("a second entry for role {}", shorten(&role.role)),
                )
                .expected("one entry for each role");
            continue;
        }
        let groups = place.key("datasetGroups");
        if role.dataset_groups.is_empty() {
            findings
                .add(ProblemKind::Missing, &groups, "no group of datasets")
                .expected("for each group a list of datasets");
        }
        for (group, ids) in &role.dataset_groups {
            let at = groups.key(group);
            if ids.is_empty() {
                findings
                    .add(
                        ProblemKind::Missing,
                        &at,
                        format!("no dataset in group {:?}", shorten(group)),
                    )
                    .expected("a list of datasets");
            }
            wanted.extend(ids.iter().enumerate().map(|(i, id)| Wanted {
                role: &role.role,
                group,
                id,
                place: at.index(i),
            }));
        }
    }
    wanted
}

/// Pairs files with ids of the group that their realm names. `None` unless that is one group for each file, with as
/// many files as ids in each.
fn by_realm<'d>(
    left: &[&Wanted<'d>],
    files: &[&(Dataset, Place)],
) -> Option<Vec<(&'d str, (String, Place))>> {
    let mut of_group: BTreeMap<&str, Vec<&'d str>> = BTreeMap::new();
    for want in left {
        of_group.entry(want.group).or_default().push(want.id);
    }
    if of_group.len() < 2 {
        return None;
    }
    let mut next: BTreeMap<&str, std::slice::Iter<&'d str>> =
        of_group.iter().map(|(group, ids)| (*group, ids.iter())).collect();
    let mut pairs = Vec::new();
    for (dataset, place) in files {
        let realm = dataset.realm.as_deref()?;
        let mut groups = realm.split('/').filter(|part| of_group.contains_key(part));
        let group = groups.next().filter(|_| groups.next().is_none())?;
        let id = next.get_mut(group)?.next()?;
        pairs.push((*id, (dataset.url.clone(), place.key("url"))));
    }
    Some(pairs)
}

/// The workers of a role that has datasets: one for each, in the groups of the association that names the dataset's.
pub(super) fn workers(
    role: &Role,
    association: &Place,
    assigned: &[&Assigned],
    rounds: Rounds,
    findings: &mut Findings,
) -> Vec<WorkerDraft> {
    let mut workers = Vec::new();
    for assigned in assigned {
        let entries = role.group_association.as_deref();
        let in_group =
            |groups: &&BTreeMap<String, String>| groups.values().any(|group| *group == assigned.group);
        let groups = match entries {
            None if assigned.group == DEFAULT_GROUP => None,
            None => {
                let found = format!(
                    "group {:?} of role {}",
                    shorten(&assigned.group),
                    shorten(&role.name)
                );
                let problem = findings.add(ProblemKind::Unknown, &assigned.place, found);
                problem.one_of(&assigned.group, [DEFAULT_GROUP]);
                continue;
            }
            Some(entries) => match entries.iter().find(in_group) {
                Some(groups) => Some(groups.clone()),
                None => {
                    let found = format!(
                        "group {:?} is in no groupAssociation of role {}",
                        shorten(&assigned.group),
                        shorten(&role.name)
                    );
                    let known = entries
                        .iter()
                        .flat_map(|groups| groups.values().map(String::as_str));
                    findings
                        .add(ProblemKind::Unknown, &assigned.place, found)
                        .one_of(&assigned.group, known);
                    continue;
                }
            },
        };
        let place = match entries.and_then(|entries| entries.iter().position(|groups| in_group(&groups))) {
            Some(i) => association.index(i),
            None => association.clone(),
        };
        workers.push(WorkerDraft {
            task_id: None,
            groups,
            place,
            count: 1,
            dataset: Some(assigned.url.clone()),
            rounds,
        });
    }
    workers
}

/// Compares names as people order them: runs of digits by their value.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (m, n) = (digits(a), digits(b));
        if m > 0 && n > 0 {
            let (x, y) = (a[..m].trim_start_matches('0'), b[..n].trim_start_matches('0'));
            let order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
            if order.is_ne() {
                return order;
            }
            (a, b) = (&a[m..], &b[n..]);
            continue;
        }
        let (mut rest_a, mut rest_b) = (a.chars(), b.chars());
        match (rest_a.next(), rest_b.next()) {
            (Some(x), Some(y)) if x == y => (a, b) = (rest_a.as_str(), rest_b.as_str()),
            (x, y) => return x.cmp(&y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_count_by_their_value() {
        let mut names = [
            "dataset10",
            "dataset2",
            "dataset1",
            "dataset",
            "dataset_b",
            "dataset_a",
            "dataset02",
        ];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names[..2], ["dataset", "dataset1"]);
        assert_eq!(names[4], "dataset10");
        assert_eq!(names[5..], ["dataset_a", "dataset_b"]);
        assert_eq!(natural("größe9", "größe10"), Ordering::Less);
    }
}
