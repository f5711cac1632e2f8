//! The tree that the channels make of the roles, and the workers in it.
//!
//! ```text
//! top ──link──▶ middle ──link──▶ leaf ──link──▶ trainer      roles: a chain
//!                 │ group a ────▶ leaf of a                   workers: within a link, ends meet in
//!                 │ group b ────▶ leaf of b                   their group, so groups are subtrees
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::channels::{Link, Links};
use super::dataset::Dataset;
use super::draft::{DEFAULT_GROUP, Draft, RoleDraft, WorkerDraft};
use super::problem::{Findings, Place, ProblemKind, list, shorten};
use super::spec::{Group, Kind, WorkerSpec};
use super::{MAX_LEVELS, MAX_WORKERS};

/// The roles in their places.
pub(super) struct Tree<'d> {
    /// From the top to the trainers.
    chain: Vec<Node<'d>>,
    /// The coordinator's role, if there is one.
    coordinator: Option<&'d RoleDraft>,
}

/// Links by the role at one of their ends.
type Ends<'d> = BTreeMap<&'d str, Vec<&'d Link<'d>>>;

/// A role in the tree.
struct Node<'d> {
    role: &'d RoleDraft,
    up: Option<&'d Link<'d>>,
    down: Option<&'d Link<'d>>,
}

impl<'d> Tree<'d> {
    /// Puts each role in its place; `None` if they do not make one tree.
    pub(super) fn new(draft: &'d Draft, links: &'d Links<'d>, findings: &mut Findings) -> Option<Self> {
        let before = findings.count();
        let coordinators: BTreeSet<&str> = links.coordination.iter().map(|link| link.coordinator).collect();
        if coordinators.len() > 1 {
            let names: Vec<&str> = coordinators.iter().copied().collect();
            let found = format!("more than one coordinator: {}", list(&names));
            let place = links.coordination.iter().map(|link| link.place).next()?;
            findings
                .add(ProblemKind::Conflict, &place.key("funcTags"), found)
                .expected("one role at most");
        }
        let (mut above, mut below) = (Ends::new(), Ends::new());
        for link in &links.models {
            above.entry(link.lower).or_default().push(link);
            below.entry(link.upper).or_default().push(link);
        }
        let mut nodes = Vec::new();
        for role in &draft.roles {
            let up = one_link(role, &above, "parents", findings);
            let down = one_link(role, &below, "children", findings);
            let connected = up.is_some() || down.is_some();
            if coordinators.contains(role.name.as_str()) {
                if connected {
                    let found = format!("the coordinator {} has a channel for models", shorten(&role.name));
                    findings.add(ProblemKind::Conflict, &role.place, found);
                }
            } else if connected {
                nodes.push(Node { role, up, down });
            } else {
                let found = format!("role {} has no channel for models", shorten(&role.name));
                findings
                    .add(ProblemKind::Missing, &role.place, found)
                    .expected("a channel with distribute and aggregate, or with fetch and upload");
            }
        }
        let coordinator = draft
            .roles
            .iter()
            .find(|role| coordinators.contains(role.name.as_str()));
        if findings.count() > before {
            return None;
        }
        let chain = chain(nodes, draft, findings)?;
        Some(Self { chain, coordinator })
    }

    /// The top's role.
    pub(super) fn top(&self) -> &'d RoleDraft {
        self.chain[0].role
    }

    /// The trainers' role.
    pub(super) fn trainer(&self) -> &'d RoleDraft {
        self.chain[self.chain.len() - 1].role
    }

    /// The coordinator's role, if there is one.
    pub(super) fn coordinator(&self) -> Option<&'d RoleDraft> {
        self.coordinator
    }

    /// All workers, in the order of [`JobSpec::workers`](super::JobSpec::workers). What is wrong with their groups
    /// is reported.
    pub(super) fn workers(&self, draft: &Draft, findings: &mut Findings) -> Vec<WorkerSpec> {
        if !self.count(findings) {
            return Vec::new();
        }
        let pairs = draft
            .channels
            .iter()
            .map(|draft| (draft.channel.name.as_str(), &draft.channel.pair));
        let pairs: BTreeMap<&str, &[String; 2]> = pairs.collect();
        let roles = self.chain.iter().map(|node| node.role).chain(self.coordinator);
        for (role, worker) in roles.flat_map(|role| role.workers.iter().map(move |worker| (role, worker))) {
            check_channels(role, worker, &pairs, findings);
        }
        let mut workers: Vec<WorkerSpec> = Vec::new();
        let mut parents: BTreeSet<&str> = BTreeSet::new();
        // Whether the groups of all parents are known: if not, their children may only seem to have none.
        let mut parents_known = true;
        for (level, node) in self.chain.iter().enumerate() {
            let kind = match (node.up, node.down) {
                (None, _) => Kind::Top,
                (_, Some(_)) => Kind::Aggregator,
                (_, None) => Kind::Trainer,
            };
            let mut children: BTreeSet<&str> = BTreeSet::new();
            let mut groups_above: BTreeSet<&str> = BTreeSet::new();
            let mut count = 0;
            let before = findings.count();
            for draft in &node.role.workers {
                let up = node.up.and_then(|link| group(draft, link, findings));
                let down = node.down.and_then(|link| group(draft, link, findings));
                if let (Some(link), Some(group)) = (node.up, up) {
                    if parents.contains(group) {
                        groups_above.insert(group);
                    } else if parents_known {
                        orphan(draft, link, group, &parents, findings);
                    }
                }
                children.extend(down);
                let name = |link: Option<&Link<'_>>, group: Option<&str>| {
                    Some(Group {
                        channel: link?.name.to_owned(),
                        group: group?.to_owned(),
                    })
                };
                for _ in 0..draft.count {
                    count += 1;
                    workers.push(WorkerSpec {
                        name: format!("{}-{count}", node.role.name),
                        role: node.role.name.clone(),
                        task_id: draft.task_id.clone(),
                        kind,
                        level: u32::try_from(level).unwrap_or(u32::MAX),
                        up: name(node.up, up),
                        down: name(node.down, down),
                        transport: node.up.map(|link| link.transport).unwrap_or_default(),
                        agg_goal: draft.rounds.agg_goal.filter(|_| kind != Kind::Trainer),
                        select: draft.rounds.select.filter(|_| kind != Kind::Trainer),
                        share: (kind == Kind::Trainer).then_some(count - 1),
                        dataset: draft
                            .dataset
                            .as_deref()
                            .filter(|_| kind == Kind::Trainer)
                            .map(Dataset::from),
                    });
                }
            }
            if let Some(link) = node.up {
                let childless: Vec<&str> = parents.difference(&groups_above).copied().collect();
                if !childless.is_empty() {
                    findings.note(format!(
                        "channel {}: no {} in group {}: aggregators there have no children",
                        link.name,
                        node.role.name,
                        list(&childless)
                    ));
                }
            }
            parents = children;
            parents_known = findings.count() == before;
        }
        workers
    }

    /// Whether there are not too many workers, one top, and one coordinator at most.
    fn count(&self, findings: &mut Findings) -> bool {
        let count = |role: &RoleDraft| {
            role.workers
                .iter()
                .map(|worker| u64::from(worker.count))
                .sum::<u64>()
        };
        let before = findings.count();
        for (role, what) in [
            (Some(self.top()), "the top"),
            (self.coordinator, "the coordinator"),
        ] {
            if let Some(role) = role
                && count(role) != 1
            {
                let found = format!(
                    "{} workers of role {}, which is {what}",
                    count(role),
                    shorten(&role.name)
                );
                findings
                    .add(ProblemKind::Conflict, &role.place, found)
                    .expected("one");
            }
        }
        let workers: u64 = self.chain.iter().map(|node| count(node.role)).sum();
        if workers > MAX_WORKERS as u64 {
            let place = Place {
                path: "roles".to_owned(),
                ..self.top().place.clone()
            };
            findings
                .add(ProblemKind::Invalid, &place, format!("{workers} workers"))
                .expected(format!("{MAX_WORKERS} at most"));
        }
        findings.count() == before
    }
}

/// The one channel to a role's parents, or children, if it has any.
fn one_link<'d>(
    role: &RoleDraft,
    ends: &Ends<'d>,
    whom: &str,
    findings: &mut Findings,
) -> Option<&'d Link<'d>> {
    let links = ends.get(role.name.as_str()).map_or(&[][..], Vec::as_slice);
    if let [first, second, ..] = links {
        let found = format!(
            "role {} has {whom} on two channels, {} and {}",
            shorten(&role.name),
            shorten(first.name),
            shorten(second.name)
        );
        findings
            .add(ProblemKind::Conflict, second.place, found)
            .expected("one channel");
    }
    links.first().copied()
}

/// Orders the roles from the top down.
fn chain<'d>(nodes: Vec<Node<'d>>, draft: &Draft, findings: &mut Findings) -> Option<Vec<Node<'d>>> {
    let mut by_name: BTreeMap<&str, Node<'d>> = nodes
        .into_iter()
        .map(|node| (node.role.name.as_str(), node))
        .collect();
    let tops: Vec<&str> = by_name
        .values()
        .filter(|node| node.up.is_none())
        .map(|node| node.role.name.as_str())
        .collect();
    if let [_, second, ..] = tops[..] {
        let place = &by_name[second].role.place;
        let found = format!("more than one top: {}", list(&tops));
        let expected = "a channel on which all but one fetch and upload";
        findings
            .add(ProblemKind::Conflict, place, found)
            .expected(expected);
        return None;
    }
    let mut chain: Vec<Node<'d>> = Vec::new();
    let mut next = tops.first().copied();
    while let Some(node) = next.and_then(|name| by_name.remove(name)) {
        next = node.down.map(|link| link.lower);
        chain.push(node);
    }
    // What no way from the top leads to has a parent each, and one child at most: circles.
    let mut circles = false;
    while let Some((first, node)) = by_name.pop_first() {
        let mut circle = vec![first];
        let mut next = node.down.map(|link| link.lower);
        while let Some((name, node)) = next.and_then(|name| by_name.remove_entry(name)) {
            circle.push(name);
            next = node.down.map(|link| link.lower);
        }
        circle.push(first);
        let found = format!("roles in a circle: {}", join(&circle, " → "));
        findings
            .add(ProblemKind::Conflict, &node.role.place, found)
            .expected("a tree with one top");
        circles = true;
    }
    if circles {
        return None;
    }
    if chain.len() < 2 {
        findings
            .add(
                ProblemKind::Missing,
                &draft.channels_place,
                "no top and no trainers",
            )
            .expected(
                "a channel between a role that distributes and aggregates and one that fetches and uploads",
            );
        return None;
    }
    if chain.len() - 1 > MAX_LEVELS {
        let names: Vec<&str> = chain[..chain.len() - 1]
            .iter()
            .map(|node| node.role.name.as_str())
            .collect();
        let found = format!("{} levels of aggregators: {}", names.len(), join(&names, ", "));
        let place = &chain[MAX_LEVELS].role.place;
        findings
            .add(ProblemKind::Unsupported, place, found)
            .expected(format!("{MAX_LEVELS} at most"));
        return None;
    }
    Some(chain)
}

/// Some names in their order, cut when there are very many.
fn join(names: &[&str], separator: &str) -> String {
    const SHOWN: usize = 12;
    let mut shown: Vec<String> = names.iter().take(SHOWN).map(|name| shorten(name)).collect();
    if names.len() > SHOWN {
        shown.push("…".to_owned());
    }
    shown.join(separator)
}

/// A worker's group on a channel of its role.
fn group<'d>(draft: &'d WorkerDraft, link: &Link<'_>, findings: &mut Findings) -> Option<&'d str> {
    const LONGEST_BYTES: usize = 256;
    let Some(groups) = &draft.groups else {
        return allowed(DEFAULT_GROUP, &draft.place, link, findings);
    };
    let place = draft.place.key(link.name);
    let Some(group) = groups.get(link.name) else {
        let found = format!("no group on channel {}", shorten(link.name));
        findings
            .add(ProblemKind::Missing, &place, found)
            .expected(format!("a group, such as {DEFAULT_GROUP:?}"));
        return None;
    };
    if group.is_empty() || group.len() > LONGEST_BYTES || group.contains(char::is_control) {
        findings
            .add(
                ProblemKind::Invalid,
                &place,
                format!("group {:?}", shorten(group)),
            )
            .expected(format!("1 to {LONGEST_BYTES} bytes without control characters"));
        return None;
    }
    allowed(group, &place, link, findings)
}

/// The group, if it is one of the channel's.
fn allowed<'g>(group: &'g str, place: &Place, link: &Link<'_>, findings: &mut Findings) -> Option<&'g str> {
    match &link.groups {
        Some(groups) if !groups.contains(group) => {
            let found = format!(
                "group {:?} is not in groupBy of channel {}",
                shorten(group),
                shorten(link.name)
            );
            findings
                .add(ProblemKind::Unknown, place, found)
                .one_of(group, groups.iter().copied());
            None
        }
        _ => Some(group),
    }
}

/// Reports channels of a worker that are not there, or not its role's.
fn check_channels(
    role: &RoleDraft,
    worker: &WorkerDraft,
    pairs: &BTreeMap<&str, &[String; 2]>,
    findings: &mut Findings,
) {
    for name in worker.groups.iter().flat_map(|groups| groups.keys()) {
        let place = worker.place.key(name);
        match pairs.get(name.as_str()) {
            Some(pair) if pair.contains(&role.name) => {}
            Some(_) => {
                let found = format!(
                    "role {} is no end of channel {}",
                    shorten(&role.name),
                    shorten(name)
                );
                findings.add(ProblemKind::Conflict, &place, found);
            }
            None => {
                let found = format!("unknown channel {:?}", shorten(name));
                findings
                    .add(ProblemKind::Unknown, &place, found)
                    .one_of(name, pairs.keys().copied());
            }
        }
    }
}

/// Reports a worker without parents.
fn orphan(
    draft: &WorkerDraft,
    link: &Link<'_>,
    group: &str,
    parents: &BTreeSet<&str>,
    findings: &mut Findings,
) {
    let place = if draft.groups.is_some() {
        draft.place.key(link.name)
    } else {
        draft.place.clone()
    };
    let found = format!(
        "no {} is in group {:?} of channel {}",
        shorten(link.upper),
        shorten(group),
        shorten(link.name)
    );
    let problem = findings.add(ProblemKind::Missing, &place, found);
    if !parents.is_empty() {
        problem.one_of(group, parents.iter().copied());
    }
}
