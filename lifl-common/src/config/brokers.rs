//! Where the transports that leave the node are reached: one address each in a job.
//!
//! A channel's `brokerHost` counts before its file's `brokers`. All that counts must agree.

use super::document::Document;
use super::draft;
use super::flame_support;
use super::problem::{Findings, Place, ProblemKind, list, shorten};
use super::raw::Channel;
use super::spec::{Brokers, Transport};

/// Flame's own port of its gRPC endpoint.
const P2P_PORT: u16 = 10104;
/// The port that is registered for MQTT.
const MQTT_PORT: u16 = 1883;

/// An address as a file gives it.
struct Given<'d> {
    host: &'d str,
    place: Place,
}

/// Reads the addresses that the channels which carry models need, and notes those that nothing needs.
pub(super) fn understand(documents: &[&Document], findings: &mut Findings) -> Brokers {
    let brokers = Brokers {
        p2p: of(Transport::P2p, documents, findings),
        mqtt: of(Transport::Mqtt, documents, findings),
    };
    note_unused(documents, findings);
    brokers
}

/// The address of a transport; `None` if no channel has it, or if it is wrong.
fn of(transport: Transport, documents: &[&Document], findings: &mut Findings) -> Option<String> {
    let before = findings.count();
    let mut overriding: Vec<Given> = Vec::new();
    // Where a channel has nothing of its own.
    let mut listed: Vec<Given> = Vec::new();
    let mut needed: Option<(&str, Place)> = None;
    for document in documents {
        let mut from_list = false;
        for (channel, place) in channels(document) {
            let (own, transport_place) = draft::transport(channel, &place, document);
            if own != transport {
                continue;
            }
            needed.get_or_insert((&channel.name, transport_place));
            match host(channel) {
                Some(host) => overriding.push(Given {
                    host,
                    place: place.key("brokerHost"),
                }),
                None => from_list = true,
            }
        }
        if from_list {
            listed.extend(in_list(document, transport));
        }
    }
    let (channel, needed_at) = needed?;
    if overriding.is_empty() {
        // Every worker's file that says where it is must mean the same place, whichever needs it.
        listed = documents
            .iter()
            .flat_map(|document| in_list(document, transport))
            .collect();
    }
    let agreed = agree(overriding.into_iter().chain(listed), transport, findings);
    if agreed.is_some() || findings.count() > before {
        return agreed;
    }
    if transport == Transport::P2p {
        return Some(format!("localhost:{P2P_PORT}"));
    }
    if documents.iter().any(|document| document.assigned.is_some()) {
        findings.note(format!(
            "the broker of {transport} is taken to be at localhost:{MQTT_PORT}: Flame's control plane knows it, and \
             these files need not say (job.json may, as brokers)"
        ));
        return Some(format!("localhost:{MQTT_PORT}"));
    }
    findings
        .add(
            ProblemKind::Missing,
            &needed_at,
            format!("channel {} goes over {transport}, and no broker of that sort is given", shorten(channel)),
        )
        .expected(format!(
            "an entry of brokers, {{\"sort\": \"{transport}\", \"host\": \"HOST\"}}, or the channel's brokerHost"
        ));
    None
}

/// The channels of a file that carry models.
fn channels(document: &Document) -> impl Iterator<Item = (&Channel, Place)> {
    let channels = document.raw.channels.iter().flatten().enumerate();
    channels
        .filter(|(_, channel)| !channel.coordinates())
        .map(|(i, channel)| (channel, document.at("channels").index(i)))
}

fn host(channel: &Channel) -> Option<&str> {
    channel.broker_host.as_deref().filter(|host| !host.is_empty())
}

/// The entries of a file's `brokers` for a transport.
fn in_list(document: &Document, transport: Transport) -> Vec<Given<'_>> {
    let brokers = document.raw.brokers.iter().flatten().enumerate();
    brokers
        .filter(|(_, broker)| broker.sort.as_deref().and_then(flame_support::transport) == Some(transport))
        .filter_map(|(i, broker)| {
            Some(Given {
                host: broker.host.as_deref()?,
                place: document.at("brokers").index(i).key("host"),
            })
        })
        .collect()
}

/// The one address that is given; each that is wrong or differs is reported.
fn agree<'d>(
    given: impl Iterator<Item = Given<'d>>,
    transport: Transport,
    findings: &mut Findings,
) -> Option<String> {
    let port = match transport {
        Transport::Mqtt => MQTT_PORT,
        Transport::P2p | Transport::Shm => P2P_PORT,
    };
    let mut first: Option<(String, Place)> = None;
    for Given { host, place } in given {
        let Some(address) = address(host, port) else {
            findings
                .add(
                    ProblemKind::Invalid,
                    &place,
                    format!("address {:?}", shorten(host)),
                )
                .expected("HOST or HOST:PORT, the port from 1 to 65535");
            continue;
        };
        match &first {
            None => first = Some((address, place)),
            Some((known, at)) if *known != address => {
                let found = format!("{transport} at {}", shorten(&address));
                findings
                    .add(ProblemKind::Conflict, &place, found)
                    .expected(format!("{} as in {}", shorten(known), at.file_name()));
            }
            Some(_) => {}
        }
    }
    first.map(|(address, _)| address)
}

/// `host:port` of an address with or without a port; an IPv6 address stands in brackets.
fn address(text: &str, default_port: u16) -> Option<String> {
    const LONGEST_BYTES: usize = 253 + ":65535".len();
    let plain = |host: &str| {
        !host.is_empty()
            && host
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    if text.len() > LONGEST_BYTES {
        return None;
    }
    if let Ok(v6) = text.parse::<std::net::Ipv6Addr>() {
        return Some(format!("[{v6}]:{default_port}"));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let bracketed = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .is_some_and(|host| host.parse::<std::net::Ipv6Addr>().is_ok());
    if !plain(host) && !bracketed {
        return None;
    }
    let port = match port {
        Some(port) if port.bytes().all(|digit| digit.is_ascii_digit()) => port.parse().ok()?,
        Some(_) => return None,
        None => default_port,
    };
    (port > 0).then(|| format!("{host}:{port}"))
}

/// Notes addresses that stand in the files and are of no use.
fn note_unused(documents: &[&Document], findings: &mut Findings) {
    let used: Vec<Transport> = documents
        .iter()
        .flat_map(|document| channels(document).map(|(channel, place)| (channel, place, *document)))
        .map(|(channel, place, document)| draft::transport(channel, &place, document).0)
        .collect();
    let mut unused: Vec<&str> = Vec::new();
    for broker in documents
        .iter()
        .flat_map(|document| document.raw.brokers.iter().flatten())
    {
        let Some(transport) = broker.sort.as_deref().and_then(flame_support::transport) else {
            continue;
        };
        let needed = transport != Transport::Shm && used.contains(&transport);
        if !needed && !unused.contains(&transport.name()) {
            unused.push(transport.name());
        }
    }
    unused.sort_unstable();
    if !unused.is_empty() {
        findings.note(format!(
            "brokers of sort {} are not used: no channel for models needs them",
            list(&unused)
        ));
    }
    let idle = documents.iter().any(|document| {
        let channels = document.raw.channels.iter().flatten().enumerate();
        channels
            .filter(|(_, channel)| host(channel).is_some())
            .any(|(i, channel)| {
                let place = document.at("channels").index(i);
                channel.coordinates() || draft::transport(channel, &place, document).0 == Transport::Shm
            })
    });
    if idle {
        findings.note(
            "brokerHost of the coordinator's channels and of shared memory is not used: they need none",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_host_and_a_port() {
        let with = |text| address(text, 1883);
        assert_eq!(with("localhost").as_deref(), Some("localhost:1883"));
        assert_eq!(with("10.0.0.7:77").as_deref(), Some("10.0.0.7:77"));
        assert_eq!(with("::1").as_deref(), Some("[::1]:1883"));
        assert_eq!(with("[::1]:9").as_deref(), Some("[::1]:9"));
        assert_eq!(with("[::1]").as_deref(), Some("[::1]:1883"));
        for bad in [
            "", ":", ":5", "a b", "a:", "a:0", "a:65536", "a:x", "a:+1", "tcp://a", "a/b", "[x]:1", "a:1:2",
        ] {
            assert_eq!(with(bad), None, "{bad}");
        }
        assert_eq!(with(&"x".repeat(1 << 20)), None);
    }
}
