//! What `lifl-daemon` is told: on its command line, and in a file for what an administrator sets for good.
//!
//! Each setting is declared once, in [`Settings`], which both are read into: an option `--pool-mib` is the key
//! `pool_mib`. The command line wins. Quotas stand in the file only.
//!
//! The file is TOML because it is written by people, with comments. A key that is not known is an error and not a hint,
//! since a quota with a slip in it would be no quota.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddrV4};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use lifl_common::session::Broker;
use lifl_daemon::plane;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Quota, Quotas};
use nix::unistd::User;
use serde::{Deserialize, Deserializer};

/// All settings. `None` is what nobody has said.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    /// Where to listen [default: /run/lifl/lifl.sock for root, else lifl.sock in the user's runtime folder]. A socket that
    /// a service manager hands over takes its place
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// The user that the daemon becomes when root starts it, before it serves anybody; root to stay root's uid [default:
    /// lifl, where there is such a user]
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// The control socket's permission bits, octal [default: 660 with a group, else 600]
    #[arg(long, value_name = "MODE", value_parser = octal)]
    #[serde(deserialize_with = "octal_key")]
    pub(crate) socket_mode: Option<u32>,
    /// The control socket's group [default: lifl, where it exists and this is root]
    #[arg(long, value_name = "GROUP")]
    pub(crate) socket_group: Option<String>,
    /// How frames travel: through the kernel, through the daemon, or the best that is allowed [default: auto]
    #[arg(long, value_enum)]
    pub(crate) plane: Option<plane::Request>,
    /// What arenas may take together, in MiB [default: half of the memory available at start]
    #[arg(long, value_name = "MIB")]
    pub(crate) pool_mib: Option<u64>,
    /// Whether arenas get huge pages of 2 MiB; auto has the kernel make missing ones if it may [default: auto]
    #[arg(long, value_enum)]
    pub(crate) huge_pages: Option<HugePages>,
    /// Workers that can be registered at a time, of all jobs [default: 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65535))]
    #[serde(deserialize_with = "count_key")]
    pub(crate) max_workers: Option<u32>,
    /// The folder of a BPF filesystem in which jobs on the sockmap outlive this daemon; daemons that run side by side need
    /// one each [default: /sys/fs/bpf/lifl]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) pin: Option<PathBuf>,
    /// Have jobs end with this daemon
    #[arg(long, conflicts_with = "pin", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) no_pin: Option<bool>,
    /// How long workers of the daemon before this one have to come back [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) grace: Option<u64>,
    /// Where Flame's Python workers connect, on the loopback [default: 127.0.0.1:10105]
    #[arg(long, value_name = "ADDR")]
    pub(crate) flame_skmsg: Option<SocketAddrV4>,
    /// Where Flame's Python workers register, on the loopback [default: 127.0.0.1:10106]
    #[arg(long, value_name = "ADDR")]
    pub(crate) flame_rpc: Option<SocketAddrV4>,
    /// How long a Flame worker's reference waits for a receiver that has not registered yet [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) flame_hold: Option<u64>,
    /// Flame workers of one user at a time [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65535))]
    #[serde(deserialize_with = "count_key")]
    pub(crate) flame_workers: Option<u32>,
    /// Serve Flame's Python workers, at two ports of the loopback: keeps CAP_SYS_PTRACE, to take their connections out of
    /// their processes
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) flame: Option<bool>,
    /// Do not serve them, which is so unless asked for
    #[arg(
        long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        conflicts_with_all = ["flame", "flame_skmsg", "flame_rpc", "flame_hold", "flame_workers"]
    )]
    pub(crate) no_flame: Option<bool>,
    /// An address, beside the loopback's, on which jobs may open the gateway, where their remote workers come in over
    /// TCP; 0.0.0.0 or :: allows all. May be given several times. Participants prove themselves and messages cannot be
    /// changed on their way, but nothing is encrypted: give an address of a network that you trust. One beyond private
    /// networks needs --insecure
    #[arg(long, value_name = "ADDR")]
    pub(crate) gateway_listen: Option<Vec<IpAddr>>,
    /// An MQTT broker that jobs may have the gateway connect with, as they name it. May be given several times [default:
    /// none]
    #[arg(long, value_name = "HOST:PORT", value_parser = broker)]
    #[serde(deserialize_with = "brokers_key")]
    pub(crate) gateway_broker: Option<Vec<Broker>>,
    /// Let models go unencrypted beyond private networks: by gateway addresses and brokers that are there
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) insecure: Option<bool>,
    /// How to log to standard error; RUST_LOG chooses what [default: text]
    #[arg(long, value_enum)]
    pub(crate) log_format: Option<LogFormat>,
    /// What users may have.
    #[arg(skip)]
    pub(crate) quota: QuotaSettings,
}

/// The table `quota`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct QuotaSettings {
    pool_mib: Option<u64>,
    workers: Option<u32>,
    jobs: Option<u32>,
    connections: Option<u32>,
    user: BTreeMap<String, UserSettings>,
}

/// A table `quota.user.NAME`: what it does not say is as for everybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct UserSettings {
    pool_mib: Option<u64>,
    workers: Option<u32>,
    jobs: Option<u32>,
    connections: Option<u32>,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is wrong with a file of settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// It cannot be read.
    #[error("{file} cannot be read")]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A key or a value.
    #[error("{file}{}: {}{what}", Line(*line), Key(key))]
    Wrong {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: Option<usize>,
        /// The key.
        key: String,
        /// What is found and expected.
        what: String,
    },
}

struct Line(Option<usize>);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, ":{line}"))
    }
}

struct Key<'a>(&'a str);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" | "." => Ok(()),
            key => write!(f, "{key}: "),
        }
    }
}

impl Settings {
    /// Reads a file.
    pub(crate) fn read(file: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(file).map_err(|source| SettingsError::Read {
            file: file.to_owned(),
            source,
        })?;
        Self::parse(&text, file)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, SettingsError> {
        let wrong = |key: String, error: &toml::de::Error| SettingsError::Wrong {
            file: file.to_owned(),
            line: error.span().map(|span| line_of(text, span.start)),
            key,
            what: for_people(error.message()),
        };
        let read = toml::Deserializer::parse(text).map_err(|error| wrong(String::new(), &error))?;
        serde_path_to_error::deserialize(read).map_err(|error| wrong(error.path().to_string(), error.inner()))
    }

    /// Whether Flame's workers are to be served, if anything says so: who asks for a detail of it asks for it.
    pub(crate) fn serves_flame(&self) -> Option<bool> {
        let details = self.flame_skmsg.is_some()
            || self.flame_rpc.is_some()
            || self.flame_hold.is_some()
            || self.flame_workers.is_some();
        let said = self.flame.or(self.no_flame.map(|no| !no));
        said.or(details.then_some(true))
    }

    /// These, and where they say nothing, those.
    pub(crate) fn over(self, below: Self) -> Self {
        let flame = self.serves_flame().or_else(|| below.serves_flame());
        // Every field is named, so that none is forgotten.
        let Self {
            socket,
            user,
            socket_mode,
            socket_group,
            plane,
            pool_mib,
            huge_pages,
            max_workers,
            pin,
            no_pin,
            grace,
            flame_skmsg,
            flame_rpc,
            flame_hold,
            flame_workers,
            flame: _,
            no_flame: _,
            gateway_listen,
            gateway_broker,
            insecure,
            log_format,
            quota,
        } = self;
        // Who asks for a thing's details asks for the thing.
        let pins = pin.is_some().then_some(false);
        Self {
            socket: socket.or(below.socket),
            user: user.or(below.user),
            socket_mode: socket_mode.or(below.socket_mode),
            socket_group: socket_group.or(below.socket_group),
            plane: plane.or(below.plane),
            pool_mib: pool_mib.or(below.pool_mib),
            huge_pages: huge_pages.or(below.huge_pages),
            max_workers: max_workers.or(below.max_workers),
            pin: pin.or(below.pin),
            no_pin: no_pin.or(pins).or(below.no_pin),
            grace: grace.or(below.grace),
            flame_skmsg: flame_skmsg.or(below.flame_skmsg),
            flame_rpc: flame_rpc.or(below.flame_rpc),
            flame_hold: flame_hold.or(below.flame_hold),
            flame_workers: flame_workers.or(below.flame_workers),
            flame,
            no_flame: None,
            gateway_listen: gateway_listen.or(below.gateway_listen),
            gateway_broker: gateway_broker.or(below.gateway_broker),
            insecure: insecure.or(below.insecure),
            log_format: log_format.or(below.log_format),
            quota: if quota == QuotaSettings::default() {
                below.quota
            } else {
                quota
            },
        }
    }
}

impl QuotaSettings {
    /// Everybody's quotas, where `share` is what the file does not say. `file` is where they stand, or would.
    pub(crate) fn resolve(&self, share: Quota, file: &Path) -> Result<Quotas, SettingsError> {
        let default = UserSettings {
            pool_mib: self.pool_mib,
            workers: self.workers,
            jobs: self.jobs,
            connections: self.connections,
        };
        let default = default.over(share);
        let mut quotas = Quotas {
            default,
            of: BTreeMap::new(),
            file: file.to_owned(),
        };
        for (name, user) in &self.user {
            let uid = uid_of(name).map_err(|what| SettingsError::Wrong {
                file: file.to_owned(),
                line: None,
                key: format!("quota.user.{name}"),
                what,
            })?;
            quotas.of.insert(uid, user.over(default));
        }
        Ok(quotas)
    }
}

impl UserSettings {
    fn over(self, below: Quota) -> Quota {
        let pool_bytes = self.pool_mib.map(|mib| mib.saturating_mul(1 << 20));
        Quota {
            pool_bytes: pool_bytes.unwrap_or(below.pool_bytes),
            workers: self.workers.unwrap_or(below.workers),
            jobs: self.jobs.unwrap_or(below.jobs),
            connections: self.connections.unwrap_or(below.connections),
            descriptors: below.descriptors,
        }
    }
}

/// A user by name or number.
fn uid_of(name: &str) -> Result<u32, String> {
    if let Ok(uid) = name.parse() {
        return Ok(uid);
    }
    match User::from_name(name) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err("there is no such user; expected a user's name or uid".to_owned()),
        Err(errno) => Err(format!("the user cannot be looked up: {errno}")),
    }
}

/// Reads an octal mode.
pub(crate) fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("{text:?} is not an octal mode such as 660"))
}

/// Reads a broker's place.
fn broker(text: &str) -> Result<Broker, String> {
    Broker::parse(text).ok_or_else(|| format!("{text:?} is no broker; expected HOST:PORT, as jobs name it"))
}

fn brokers_key<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<Broker>>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let brokers = texts.iter().map(|text| broker(text));
    let brokers: Result<_, _> = brokers.collect();
    brokers.map(Some).map_err(serde::de::Error::custom)
}

fn octal_key<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(from)
        .map_err(|error| serde::de::Error::custom(format!("{error}: an octal mode such as \"660\"")))?;
    octal(&text).map(Some).map_err(serde::de::Error::custom)
}

fn count_key<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let count = i64::deserialize(from)?;
    match u32::try_from(count) {
        Ok(count @ 1..=65535) => Ok(Some(count)),
        _ => Err(serde::de::Error::custom(format!("{count} is not in 1 to 65535"))),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.get(..offset).unwrap_or(text);
    before.matches('\n').count() + 1
}

/// Rust's names for things in words of those who write the file, and a guess at what was meant.
fn for_people(message: &str) -> String {
    let mut text = message.trim().replace('\n', ", ");
    for (rust, word) in [
        ("expected u64", "expected a whole number from 0"),
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected i64", "expected a whole number"),
        ("expected struct", "expected a table:"),
        ("variant", "value"),
        ("field", "key"),
    ] {
        text = text.replace(rust, word);
    }
    if let Some(hint) = hint(&text) {
        text.push_str(&format!("; did you mean {hint}?"));
    }
    text
}

/// Of the names after "expected", the one most like the one that was found.
fn hint(text: &str) -> Option<String> {
    let mut names = text.split('`').skip(1).step_by(2);
    let found = names.next().filter(|_| text.starts_with("unknown"))?;
    let near = names.map(|name| (strsim::damerau_levenshtein(found, name), name));
    let (distance, name) = near.min()?;
    (distance <= 3 && distance < found.len()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use lifl_daemon::Brokers;

    use super::*;
    use crate::Cli;

    /// The example that is installed: everything in it is a comment, and says what holds anyway.
    const EXAMPLE: &str = include_str!("../systemd/daemon.toml");

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse(text, Path::new("/etc/lifl/daemon.toml")).map_err(|error| error.to_string())
    }

    fn cli(arguments: &[&str]) -> Settings {
        let all = ["lifl-daemon"].iter().chain(arguments);
        Cli::try_parse_from(all).expect("a command line").settings
    }

    /// The example with its comments taken off the settings.
    fn example() -> String {
        let uncommented = |line: &str| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|first: char| first.is_ascii_lowercase() || first == '[') => {
                rest.to_owned()
            }
            _ => String::new(),
        };
        EXAMPLE.lines().map(uncommented).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn every_option_is_a_key_and_stands_in_the_example() {
        let table: toml::Table = example().parse().expect("TOML");
        let not_settings = ["config", "reset", "help", "version"];
        for option in Cli::command().get_arguments() {
            let key = option.get_id().as_str();
            if !not_settings.contains(&key) {
                assert!(table.contains_key(key), "{key} is not in the example");
            }
        }
        parse(&example()).expect("the example's settings are settings");
        assert_eq!(parse(EXAMPLE), Ok(Settings::default()), "all of it is a comment");
    }

    #[test]
    fn the_command_line_wins_and_what_it_does_not_say_stands() {
        let file =
            parse("pool_mib = 100\nmax_workers = 7\nno_flame = true\nno_pin = true").expect("settings");
        let both = cli(&["--pool-mib", "200"]).over(file.clone());
        assert_eq!((both.pool_mib, both.max_workers), (Some(200), Some(7)));
        let flame = cli(&["--no-flame=false", "--pin", "/x"]).over(file.clone());
        assert_eq!((flame.flame, flame.no_pin), (Some(true), Some(false)));
        let unsaid = Settings {
            flame: Some(false),
            no_flame: None,
            ..file.clone()
        };
        assert_eq!(cli(&[]).over(file), unsaid);
    }

    #[test]
    fn flames_workers_are_served_to_who_asks_for_it_or_for_a_detail_of_it() {
        let of = |options: &[&str], file: &str| cli(options).over(parse(file).expect("settings")).flame;
        assert_eq!(of(&[], ""), None);
        assert_eq!(of(&["--flame"], ""), Some(true));
        assert_eq!(of(&[], "flame = true"), Some(true));
        assert_eq!(of(&[], "flame_hold = 5"), Some(true));
        assert_eq!(of(&["--flame-hold", "5"], "flame = false"), Some(true));
        assert_eq!(of(&["--no-flame"], "flame = true"), Some(false));
        assert_eq!(of(&["--flame=false"], "flame_hold = 5"), Some(false));
        // As files said it when it was on unless said otherwise.
        assert_eq!(of(&[], "no_flame = true"), Some(false));
        assert_eq!(of(&[], "no_flame = false"), Some(true));
        assert_eq!(of(&[], "no_flame = true\nflame_hold = 5"), Some(false));
    }

    #[test]
    fn what_is_wrong_is_named_with_file_line_key_and_expectation() {
        let cases = [
            (
                "pool_mb = 1",
                "/etc/lifl/daemon.toml:1: ",
                "unknown key `pool_mb`",
            ),
            ("pool_mb = 1", "did you mean pool_mib?", "expected one of"),
            (
                "\n\npool_mib = \"big\"",
                "/etc/lifl/daemon.toml:3: pool_mib: ",
                "expected a whole number",
            ),
            ("pool_mib = -1", ":1: pool_mib: ", "expected a whole number"),
            (
                "max_workers = 70000",
                ":1: max_workers: ",
                "70000 is not in 1 to 65535",
            ),
            (
                "socket_mode = 660",
                ":1: socket_mode: ",
                "an octal mode such as \"660\"",
            ),
            ("socket_mode = \"999\"", ":1: socket_mode: ", "not an octal mode"),
            (
                "plane = \"fast\"",
                ":1: plane: ",
                "expected one of `auto`, `sockmap`, `relay`",
            ),
            (
                "huge_pages = \"alway\"",
                "did you mean always?",
                "unknown value `alway`",
            ),
            ("[quota]\nworker = 1", ":2: quota", "did you mean workers?"),
            (
                "[quota.user.1000]\npool_mib = 1.5",
                ":2: quota.user.1000.pool_mib: ",
                "expected a whole number",
            ),
            ("quota = 5", ":1: quota: ", "expected a table"),
            ("gateway_listen = [\"here\"]", ":1: gateway_listen", "IP address"),
            (
                "gateway_broker = [\"here\"]",
                ":1: gateway_broker: ",
                "expected HOST:PORT",
            ),
            ("insecure = 1", ":1: insecure: ", "expected a boolean"),
            ("pool_mib 100", "/etc/lifl/daemon.toml:1: ", "="),
        ];
        for (text, place, what) in cases {
            let error = parse(text).expect_err(text);
            assert!(error.contains(place) && error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn what_would_go_unencrypted_into_public_networks_is_refused_at_the_start() {
        let options = |arguments: &[&str]| {
            let options = crate::gateway_options(&cli(arguments));
            options.map_err(|error| format!("{error:#}"))
        };
        for address in ["0.0.0.0", "::", "203.0.113.7", "2001:db8::7"] {
            let refused = options(&["--gateway-listen", address]).expect_err(address);
            for part in ["--gateway-listen: ", address, "--insecure"] {
                assert!(refused.contains(part), "{refused}");
            }
            options(&["--gateway-listen", address, "--insecure"]).expect(address);
        }
        let private = ["--gateway-listen", "10.0.0.7", "--gateway-broker", "Broker:1883"];
        let options = options(&private).expect("private");
        let reach = options.check_reach().expect("private");
        assert_eq!(reach, ["10.0.0.7".parse::<IpAddr>().expect("an address")]);
        let named = Broker::parse("broker:1883").expect("a broker");
        assert!(matches!(&options.brokers, Brokers::These(brokers) if *brokers == [named]));
    }

    #[test]
    fn quotas_are_for_all_with_exceptions_by_name_or_number() {
        let text =
            "[quota]\npool_mib = 600\n[quota.user.root]\nworkers = 3\n[quota.user.1000]\npool_mib = 2000";
        let settings = parse(text).expect("settings");
        let share = Quota::share_of(1 << 40, 100, 200);
        let quotas = settings.quota.resolve(share, Path::new("x")).expect("users");
        assert_eq!(quotas.of(4321).pool_bytes, 600 << 20);
        assert_eq!(quotas.of(4321).workers, share.workers);
        assert_eq!((quotas.of(0).workers, quotas.of(0).pool_bytes), (3, 600 << 20));
        assert_eq!(quotas.of(1000).pool_bytes, 2000 << 20);
        let nobody = parse("[quota.user.\"no such user\"]\njobs = 1").expect("settings");
        let error = nobody.quota.resolve(share, Path::new("x")).expect_err("nobody");
        assert!(
            error
                .to_string()
                .contains("x: quota.user.no such user: there is no such user"),
            "{error}"
        );
    }
}
