//! Addresses of MQTT brokers.

use std::fmt;
use std::net::SocketAddr;

use super::message::SessionError;
use super::reach::Reach;

/// Where a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    host: String,
    port: u16,
}

impl Broker {
    /// From `host:port`.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let host = host.to_ascii_lowercase();
        (!host.is_empty()).then_some(Self { host, port })
    }

    /// Whether it is named as on this machine's loopback.
    pub fn is_local(&self) -> bool {
        Reach::of_host(&self.to_string()) == Some(Reach::Loopback)
    }

    /// The addresses that the host has now. Who connects, connects to these: another look at the name might find others.
    ///
    /// # Errors
    /// If it has none, or one beyond private networks where `insecure` does not allow that.
    pub async fn addresses(&self, insecure: bool) -> Result<Vec<SocketAddr>, SessionError> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let found: Vec<SocketAddr> = tokio::net::lookup_host((host, self.port)).await?.collect();
        for address in &found {
            Reach::permit(address.ip(), insecure)?;
        }
        Ok(found)
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}
