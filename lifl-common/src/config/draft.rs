//! One job in Flame's terms, from a job file or from its workers' files: each thing with the place it stands at.

use std::collections::{BTreeMap, BTreeSet};

use super::algorithms;
use super::control_plane;
use super::datasets;
use super::document::{Document, FileKind};
use super::flame_support;
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::raw::{Channel, FlameFile, Job};
use super::spec::Transport;

/// Group of a worker that is given none.
pub(super) const DEFAULT_GROUP: &str = "default";

/// A job, read but not understood.
pub(super) struct Draft {
    /// Where its channels stand, in its file or the first of them.
    pub(super) channels_place: Place,
    /// Its names.
    pub(super) job: Option<Job>,
    /// Its roles, in file order.
    pub(super) roles: Vec<RoleDraft>,
    /// Its channels, in file order.
    pub(super) channels: Vec<ChannelDraft>,
    /// Whether all roles and channels are here: if not, what is odd about the tree may only follow from that.
    pub(super) whole: bool,
}

/// A role and its workers.
pub(super) struct RoleDraft {
    pub(super) name: String,
    /// Where it is named.
    pub(super) place: Place,
    pub(super) workers: Vec<WorkerDraft>,
}

/// Some workers of a role with the same groups.
pub(super) struct WorkerDraft {
    /// Flame's id, from a worker file.
    pub(super) task_id: Option<String>,
    /// Channel to group; `None` for `default` everywhere.
    pub(super) groups: Option<BTreeMap<String, String>>,
    /// Where the groups are given, or should be.
    pub(super) place: Place,
    /// How many workers.
    pub(super) count: u32,
    /// The dataset that its own file, or its own entry in a file, gives it.
    pub(super) dataset: Option<String>,
    /// Its round's goal and selection, if it is an aggregator.
    pub(super) rounds: Rounds,
}

/// How a worker's rounds go, if it is an aggregator.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    pub(super) agg_goal: Option<u32>,
    pub(super) select: Option<u32>,
}

impl Rounds {
    fn new(raw: &FlameFile) -> Self {
        Self {
            agg_goal: raw.hyperparameters.as_ref().and_then(|given| given.agg_goal),
            select: algorithms::select(raw.selector.as_ref()),
        }
    }
}

pub(super) struct ChannelDraft {
    pub(super) channel: Channel,
    pub(super) place: Place,
    /// Its transport, its own or the file's, and where that is given; what is no transport reads as shared memory.
    pub(super) transport: Transport,
    pub(super) transport_place: Place,
    /// Whether files disagree about its transport.
    pub(super) mixed: bool,
}

impl ChannelDraft {
    fn new(channel: Channel, place: Place, document: &Document) -> Self {
        let (transport, transport_place) = transport(&channel, &place, document);
        Self {
            channel,
            place,
            transport,
            transport_place,
            mixed: false,
        }
    }
}

/// A channel's transport and where it is given: its own, else the file's, else shared memory. Flame takes an empty
/// name for none.
pub(super) fn transport(channel: &Channel, place: &Place, document: &Document) -> (Transport, Place) {
    let given = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    let (name, place) = match (given(&channel.backend), given(&document.raw.backend)) {
        (Some(own), _) => (own, place.key("backend")),
        (None, Some(files)) => (files, document.at("backend")),
        (None, None) => return (Transport::default(), place.clone()),
    };
    (flame_support::transport(&name).unwrap_or_default(), place)
}

pub(super) fn from_job_file(document: &Document, findings: &mut Findings) -> Draft {
    let raw = &document.raw;
    let rounds = Rounds::new(raw);
    let mut names = BTreeSet::new();
    let mut roles = Vec::new();
    for (i, role) in raw.roles.iter().flatten().enumerate() {
        let at = document.at("roles").index(i);
        check_name("role", &role.name, &at.key("name"), findings);
        if !names.insert(role.name.as_str()) {
            let found = format!("a second role {}", shorten(&role.name));
            findings
                .add(ProblemKind::Conflict, &at.key("name"), found)
                .expected("names that differ");
            continue;
        }
        let count = role.replica.unwrap_or(1);
        let association = at.key("groupAssociation");
        let workers = match (
            control_plane::assigned(document, &role.name),
            &role.group_association,
        ) {
            (Some(assigned), _) if !assigned.is_empty() => {
                if role.replica.is_some_and(|replica| replica != 1) {
                    findings.note(format!(
                        "replica of role {} is not used: each of its datasets has one worker",
                        shorten(&role.name)
                    ));
                }
                datasets::workers(role, &association, &assigned, rounds, findings)
            }
            (_, None) => vec![WorkerDraft {
                task_id: None,
                groups: None,
                place: association,
                count,
                dataset: None,
                rounds,
            }],
            (_, Some(entries)) => entries
                .iter()
                .enumerate()
                .map(|(i, groups)| WorkerDraft {
                    task_id: None,
                    groups: Some(groups.clone()),
                    place: association.index(i),
                    count,
                    dataset: None,
                    rounds,
                })
                .collect(),
        };
        roles.push(RoleDraft {
            name: role.name.clone(),
            place: at,
            workers,
        });
    }
    let mut names = BTreeSet::new();
    let mut channels = Vec::new();
    for (i, channel) in raw.channels.iter().flatten().enumerate() {
        let at = document.at("channels").index(i);
        check_name("channel", &channel.name, &at.key("name"), findings);
        if names.insert(channel.name.as_str()) {
            channels.push(ChannelDraft::new(channel.clone(), at, document));
        } else {
            let found = format!("a second channel {}", shorten(&channel.name));
            findings
                .add(ProblemKind::Conflict, &at.key("name"), found)
                .expected("names that differ");
        }
    }
    check_job(document, findings);
    let whole = raw.roles.is_some() && raw.channels.is_some();
    Draft {
        channels_place: document.at("channels"),
        job: raw.job.clone(),
        roles,
        channels,
        whole,
    }
}

/// The draft of a job whose workers each have a file; `all` says whether every file that was given is here.
pub(super) fn from_worker_files(
    documents: &[&Document],
    first: &Document,
    all: bool,
    findings: &mut Findings,
) -> Draft {
    let mut draft = Draft {
        channels_place: first.at("channels"),
        job: None,
        roles: Vec::new(),
        channels: Vec::new(),
        whole: all,
    };
    let mut job_place = None;
    let mut role_index = BTreeMap::new();
    let mut channel_index = BTreeMap::new();
    let mut workers: BTreeMap<(&str, &str), &Place> = BTreeMap::new();
    for document in documents {
        let (raw, place) = (&document.raw, &document.place);
        draft.whole &= raw.channels.is_some() && raw.role.is_some() && raw.taskid.is_some();
        check_job(document, findings);
        match (&raw.job, &draft.job, &job_place) {
            (Some(job), Some(first), Some(first_place)) => {
                same_job(job, first, &place.key("job"), first_place, findings);
            }
            (Some(job), ..) => {
                draft.job = Some(job.clone());
                job_place = Some(place.clone());
            }
            (None, ..) => {}
        }
        for (i, channel) in raw.channels.iter().flatten().enumerate() {
            let at = place.key("channels").index(i);
            let next = ChannelDraft::new(channel.clone(), at, document);
            if let Some(&known) = channel_index.get(channel.name.as_str()) {
                draft.whole &= same_channel(&mut draft.channels[known], &next, findings);
            } else {
                check_name("channel", &channel.name, &next.place.key("name"), findings);
                channel_index.insert(channel.name.as_str(), draft.channels.len());
                draft.channels.push(next);
            }
        }
        let (Some(role), Some(task_id)) = (&raw.role, &raw.taskid) else {
            continue;
        };
        check_name("taskid", task_id, &place.key("taskid"), findings);
        if let Some(first) = workers.insert((role, task_id), place) {
            let found = format!(
                "role {} with taskid {} is in {} too",
                shorten(role),
                shorten(task_id),
                first.file_name()
            );
            findings
                .add(ProblemKind::Conflict, &place.key("taskid"), found)
                .expected("one file for each worker: remove one of the two, or give it a taskid of its own");
            draft.whole = false;
            continue;
        }
        let index = *role_index.entry(role.as_str()).or_insert_with(|| {
            check_name("role", role, &place.key("role"), findings);
            let place = place.key("role");
            draft.roles.push(RoleDraft {
                name: role.clone(),
                place,
                workers: Vec::new(),
            });
            draft.roles.len() - 1
        });
        draft.roles[index].workers.push(WorkerDraft {
            task_id: Some(task_id.clone()),
            groups: raw.group_association.clone(),
            place: place.key("groupAssociation"),
            count: 1,
            dataset: raw.dataset.clone().filter(|dataset| !dataset.is_empty()),
            rounds: Rounds::new(raw),
        });
    }
    note_colliding_taskids(&workers, findings);
    draft
}

/// Notes workers that Flame's SDK cannot tell apart: on its `shm` channels a worker is the last two bytes of its taskid.
fn note_colliding_taskids(workers: &BTreeMap<(&str, &str), &Place>, findings: &mut Findings) {
    let mut same: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for ((role, task_id), place) in workers {
        if let Some(end) = flame_id(task_id) {
            let worker = format!("{} in {}", shorten(role), place.file_name());
            same.entry(end).or_default().push(worker);
        }
    }
    for (end, workers) in same {
        let [first, second, others @ ..] = workers.as_slice() else {
            continue;
        };
        let others = match others.len() {
            0 => String::new(),
            more => format!(", and {more} more,"),
        };
        findings.note(format!(
            "the taskids of {first} and {second}{others} end with the same four digits, {end}: `lifl run` tells these workers \
             apart by their roles and taskids, Flame's own workers take one for the other; for those, give each a taskid \
             whose last four digits no other has"
        ));
    }
}

/// The last two bytes of a hexadecimal taskid.
fn flame_id(task_id: &str) -> Option<String> {
    let digits = task_id.len() >= 4 && task_id.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| task_id[task_id.len() - 4..].to_ascii_lowercase())
}

/// Whether a file is of the kind that it is read as, beyond what the schema says.
pub(super) fn check_kind(document: &Document, findings: &mut Findings) {
    let (raw, place) = (&document.raw, &document.place);
    let given = |key: &str, is: bool| is.then(|| place.key(key));
    let foreign = match document.kind {
        FileKind::Job => [
            given("role", raw.role.is_some()),
            given("taskid", raw.taskid.is_some()),
            given("groupAssociation", raw.group_association.is_some()),
        ],
        FileKind::Worker => [None, None, None],
    };
    for place in foreign.into_iter().flatten() {
        findings
            .add(
                ProblemKind::Conflict,
                &place,
                "a worker file's field in a job file",
            )
            .expected("roles, or role and taskid, not both");
    }
    if document.kind == FileKind::Worker {
        for (key, is) in [("role", raw.role.is_some()), ("taskid", raw.taskid.is_some())] {
            if !is && !findings.any_at(&place.key(key)) {
                findings
                    .add(ProblemKind::Missing, &place.key(key), "missing")
                    .expected("a string");
            }
        }
    }
}

fn check_job(document: &Document, findings: &mut Findings) {
    if let Some(job) = &document.raw.job {
        let place = document.at("job");
        check_name("job", &job.id, &place.key("id"), findings);
        if let Some(name) = &job.name {
            check_name("job", name, &place.key("name"), findings);
        }
    }
}

fn same_job(job: &Job, first: &Job, place: &Place, first_place: &Place, findings: &mut Findings) {
    let pairs = [
        ("id", Some(&job.id), Some(&first.id)),
        ("name", job.name.as_ref(), first.name.as_ref()),
    ];
    for (key, this, first) in pairs {
        if let (Some(this), Some(first)) = (this, first)
            && this != first
        {
            let found = format!("another job: {:?}", shorten(this));
            findings
                .add(ProblemKind::Conflict, &place.key(key), found)
                .expected(format!("{:?} as in {}", shorten(first), first_place.file_name()));
        }
    }
}

/// Whether two files say the same about a channel.
fn same_channel(first: &mut ChannelDraft, next: &ChannelDraft, findings: &mut Findings) -> bool {
    let (a, b) = (&first.channel, &next.channel);
    let groups = |channel: &Channel| -> Option<BTreeSet<String>> {
        Some(
            channel
                .group_by
                .as_ref()?
                .value
                .as_ref()?
                .iter()
                .cloned()
                .collect(),
        )
    };
    let tags = |channel: &Channel| -> BTreeMap<String, BTreeSet<super::raw::Tag>> {
        let entries = channel.func_tags.iter();
        entries
            .map(|(role, tags)| (role.clone(), tags.iter().copied().collect()))
            .collect()
    };
    let sorted = |channel: &Channel| BTreeSet::from(channel.pair.clone());
    let mut same = true;
    let differences = [
        ("pair", sorted(a) != sorted(b)),
        ("funcTags", tags(a) != tags(b)),
        ("groupBy", groups(a) != groups(b)),
    ];
    for (key, _) in differences.into_iter().filter(|&(_, differs)| differs) {
        let found = format!(
            "channel {}: other {key} than in {}",
            shorten(&a.name),
            first.place.file_name()
        );
        findings
            .add(ProblemKind::Conflict, &next.place.key(key), found)
            .expected("the same in all files");
        same = false;
    }
    // The coordinator's channels may have any transport. One such conflict tells enough about a channel.
    if !a.coordinates() && first.transport != next.transport {
        if !first.mixed {
            let found = format!(
                "channel {} is {} in {}, {} in {}",
                shorten(&a.name),
                first.transport,
                first.place.file_name(),
                next.transport,
                next.place.file_name()
            );
            let problem = findings.add(ProblemKind::Conflict, &next.transport_place, found);
            problem.expected("one transport in all files of a channel");
        }
        first.mixed = true;
        same = false;
    }
    same
}

const LONGEST_NAME_BYTES: usize = 64;

/// Whether a worker may be called that: names go into the names of files and processes.
pub fn is_name(name: &str) -> bool {
    let bad = |c: char| c == '/' || c == '\\' || c.is_control();
    !name.is_empty() && name.len() <= LONGEST_NAME_BYTES && !name.starts_with('.') && !name.contains(bad)
}

fn check_name(what: &str, name: &str, place: &Place, findings: &mut Findings) {
    if !is_name(name) {
        findings
            .add(
                ProblemKind::Invalid,
                place,
                format!("{what} name {:?}", shorten(name)),
            )
            .expected(format!(
                "1 to {LONGEST_NAME_BYTES} bytes without '/', '\\' and control characters, not starting with '.'"
            ));
    }
}
