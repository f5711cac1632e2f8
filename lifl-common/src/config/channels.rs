//! What each channel connects: its tags say who is above.

use std::collections::BTreeSet;

use super::draft::{ChannelDraft, Draft};
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::raw::{Side, Tag};
use super::spec::Transport;

/// A channel that models go through.
pub(super) struct Link<'d> {
    /// The channel's name.
    pub(super) name: &'d str,
    /// Where it is given.
    pub(super) place: &'d Place,
    /// How models and updates go through it.
    pub(super) transport: Transport,
    /// Its groups, if they are listed.
    pub(super) groups: Option<BTreeSet<&'d str>>,
    /// The role that distributes and aggregates.
    pub(super) upper: &'d str,
    /// The role that fetches and uploads.
    pub(super) lower: &'d str,
}

/// A channel between the coordinator and another role.
pub(super) struct CoordinatorLink<'d> {
    /// Where it is given.
    pub(super) place: &'d Place,
    /// The coordinator's role.
    pub(super) coordinator: &'d str,
}

/// The channels, understood.
pub(super) struct Links<'d> {
    /// Whether that is all of them: if not, they may not make a tree only for that.
    pub(super) sound: bool,
    pub(super) models: Vec<Link<'d>>,
    pub(super) coordination: Vec<CoordinatorLink<'d>>,
}

/// What an end does on its channel.
enum End {
    Upper,
    Lower,
    /// The coordinator itself.
    Coordinator,
    /// Whom it coordinates.
    Coordinated,
}

pub(super) fn understand<'d>(draft: &'d Draft, findings: &mut Findings) -> Links<'d> {
    let mut links = Links {
        sound: draft.whole,
        models: Vec::new(),
        coordination: Vec::new(),
    };
    let roles: BTreeSet<&str> = draft.roles.iter().map(|role| role.name.as_str()).collect();
    // The coordinator may be left out of worker files: nothing here depends on its file.
    let from_worker_files = draft
        .roles
        .iter()
        .flat_map(|role| &role.workers)
        .any(|worker| worker.task_id.is_some());
    for channel in &draft.channels {
        let before = findings.count();
        let known = |role: &str| {
            let may_be_absent = from_worker_files && channel.channel.coordinates();
            !draft.whole || may_be_absent || roles.contains(role)
        };
        for (i, role) in channel
            .channel
            .pair
            .iter()
            .enumerate()
            .filter(|(_, role)| !known(role))
        {
            let place = channel.place.key("pair").index(i);
            let found = format!("unknown role {:?}", shorten(role));
            findings
                .add(ProblemKind::Unknown, &place, found)
                .one_of(role, roles.iter().copied());
        }
        connect(channel, &mut links, findings);
        links.sound &= findings.count() == before;
    }
    if draft.channels.iter().any(|channel| channel.channel.coordinates()) {
        findings.note(
            "the backend of the coordinator's channels is not used: its traffic always goes through the \
             node's daemon",
        );
    }
    links
}

/// Adds what a channel connects.
fn connect<'d>(draft: &'d ChannelDraft, links: &mut Links<'d>, findings: &mut Findings) {
    let (channel, place) = (&draft.channel, &draft.place);
    let [a, b] = &channel.pair;
    if a == b {
        findings
            .add(
                ProblemKind::Invalid,
                &place.key("pair"),
                format!("role {} twice", shorten(a)),
            )
            .expected("two roles");
        return;
    }
    for role in channel.func_tags.keys().filter(|&role| role != a && role != b) {
        let found = format!(
            "role {:?} is no end of channel {}",
            shorten(role),
            shorten(&channel.name)
        );
        let problem = findings.add(ProblemKind::Unknown, &place.key("funcTags").key(role), found);
        problem.one_of(role, [a.as_str(), b.as_str()]);
    }
    let ends = (end(draft, a, findings), end(draft, b, findings));
    let (Some(a_end), Some(b_end)) = ends else { return };
    let (name, groups) = (channel.name.as_str(), channel.group_by.as_ref());
    let groups = groups.and_then(|groups| groups.value.as_deref());
    let groups = groups.map(|groups| groups.iter().map(String::as_str).collect());
    match (a_end, b_end) {
        (End::Upper, End::Lower) => links.models.push(Link {
            name,
            place,
            transport: draft.transport,
            groups,
            upper: a,
            lower: b,
        }),
        (End::Lower, End::Upper) => links.models.push(Link {
            name,
            place,
            transport: draft.transport,
            groups,
            upper: b,
            lower: a,
        }),
        (End::Coordinator, End::Coordinated) => {
            links.coordination.push(CoordinatorLink {
                place,
                coordinator: a,
            });
        }
        (End::Coordinated, End::Coordinator) => {
            links.coordination.push(CoordinatorLink {
                place,
                coordinator: b,
            });
        }
        _ => {
            let found = format!(
                "channel {}: {} and {} do not fit together",
                shorten(&channel.name),
                shorten(a),
                shorten(b)
            );
            findings
                .add(ProblemKind::Invalid, &place.key("funcTags"), found)
                .expected(
                    "one end that distributes and aggregates and one that fetches and uploads, or one \
                     coordinate and one coordinateWith…",
                );
        }
    }
}
/// What a role does on a channel, by its tags.
fn end(draft: &ChannelDraft, role: &str, findings: &mut Findings) -> Option<End> {
    let place = draft.place.key("funcTags").key(role);
    let tags = draft.channel.func_tags.get(role).map_or(&[][..], Vec::as_slice);
    let has = |tag: Tag| tags.contains(&tag);
    let side = |side: Side| tags.iter().any(|tag| tag.side() == side);
    let sides = [Side::Upper, Side::Lower, Side::Coordination].map(side);
    let needs = |found: String, expected: &str, findings: &mut Findings| {
        findings
            .add(ProblemKind::Missing, &place, found)
            .expected(expected);
        None
    };
    match sides {
        [false, false, false] => {
            let found = format!("role {} has no funcTags on channel {}", role, draft.channel.name);
            let expected = "distribute and aggregate, or fetch and upload, or coordinate…";
            needs(shorten(&found), expected, findings)
        }
        [true, false, false] if has(Tag::Distribute) && has(Tag::Aggregate) => Some(End::Upper),
        [true, false, false] => needs(
            "half a parent".to_owned(),
            "both distribute and aggregate",
            findings,
        ),
        [false, true, false] if has(Tag::Fetch) && has(Tag::Upload) => Some(End::Lower),
        [false, true, false] => needs("half a child".to_owned(), "both fetch and upload", findings),
        [false, false, true] if !has(Tag::Coordinate) => Some(End::Coordinator),
        [false, false, true] if tags.iter().all(|&tag| tag == Tag::Coordinate) => Some(End::Coordinated),
        _ => {
            let names = serde_json::to_string(tags).unwrap_or_default();
            let found = format!("tags of more than one side: {names}");
            findings.add(ProblemKind::Conflict, &place, found).expected(
                "distribute and aggregate (the parent), or fetch and upload (the child), or coordinate…",
            );
            None
        }
    }
}
