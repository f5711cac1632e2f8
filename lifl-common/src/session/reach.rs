//! Who may be on the way to an address: what goes there is not encrypted.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Models would go unencrypted to an address beyond private networks, and nobody has said that they may.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "models would go unencrypted by way of {0}, {reach}: give an address on the loopback or in a private network, or pass \
     --insecure",
    reach = Reach::of(*.0)
)]
pub struct Exposed(pub IpAddr);

/// How far an address is from this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// The loopback.
    Loopback,
    /// A network that is somebody's own: RFC 1918, RFC 6598 (100.64/10), RFC 4193 (fc00::/7), link-local.
    Private,
    /// Anything else, and the unspecified address, which stands for all.
    Public,
}

impl Reach {
    /// Of that address.
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let [first, second, ..] = address.octets();
        let shared = first == 100 && (64..128).contains(&second);
        if address.is_loopback() {
            Self::Loopback
        } else if address.is_private() || address.is_link_local() || shared {
            Self::Private
        } else {
            Self::Public
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        if address.is_loopback() {
            Self::Loopback
        } else if address.is_unique_local() || address.is_unicast_link_local() {
            Self::Private
        } else {
            Self::Public
        }
    }

    /// Whether models may go there unencrypted; `insecure` says that they may go anywhere.
    ///
    /// # Errors
    /// If not.
    pub fn permit(address: IpAddr, insecure: bool) -> Result<Self, Exposed> {
        match Self::of(address) {
            Self::Public if !insecure => Err(Exposed(address)),
            reach => Ok(reach),
        }
    }

    /// Of the host of `host:port`, if that can be said without asking anybody for a name.
    pub fn of_host(address: &str) -> Option<Self> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.eq_ignore_ascii_case("localhost") {
            return Some(Self::Loopback);
        }
        host.parse().ok().map(Self::of)
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "on this machine's loopback",
            Self::Private => "in a private network",
            Self::Public => "beyond private networks",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_as_far_as_their_registries_say() {
        for (address, reach) in [
            ("127.0.0.1", Reach::Loopback),
            ("127.255.255.254", Reach::Loopback),
            ("::1", Reach::Loopback),
            ("::ffff:127.0.0.1", Reach::Loopback),
            ("10.0.0.1", Reach::Private),
            ("172.16.0.1", Reach::Private),
            ("172.31.255.255", Reach::Private),
            ("192.168.7.7", Reach::Private),
            ("169.254.1.1", Reach::Private),
            ("100.64.0.1", Reach::Private),
            ("100.127.255.255", Reach::Private),
            ("fe80::1", Reach::Private),
            ("fd00::1", Reach::Private),
            ("::ffff:10.1.2.3", Reach::Private),
            ("0.0.0.0", Reach::Public),
            ("::", Reach::Public),
            ("::ffff:0.0.0.0", Reach::Public),
            ("1.1.1.1", Reach::Public),
            ("172.15.0.1", Reach::Public),
            ("172.32.0.1", Reach::Public),
            ("100.63.255.255", Reach::Public),
            ("100.128.0.0", Reach::Public),
            ("192.169.0.1", Reach::Public),
            ("255.255.255.255", Reach::Public),
            ("224.0.0.1", Reach::Public),
            ("2001:db8::1", Reach::Public),
            ("ff02::1", Reach::Public),
            ("::ffff:8.8.8.8", Reach::Public),
        ] {
            let parsed = address.parse().expect("an address");
            assert_eq!(Reach::of(parsed), reach, "{address}");
        }
    }

    #[test]
    fn names_are_not_looked_up() {
        assert_eq!(Reach::of_host("localhost:1883"), Some(Reach::Loopback));
        assert_eq!(Reach::of_host("[fd00::7]:1883"), Some(Reach::Private));
        assert_eq!(Reach::of_host("9.9.9.9:1"), Some(Reach::Public));
        assert_eq!(Reach::of_host("broker.example:1883"), None);
    }
}
