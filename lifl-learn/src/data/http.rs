//! GET, as downloads need it: redirects followed by hand, proxies by the usual variables, the system's certificates.
//!
//! TLS, and what goes through a proxy's CONNECT, is ureq's. Plain http through a proxy is a request to the proxy with the whole
//! URL in it (RFC 9112, 3.2.2), which ureq cannot send: many proxies refuse a CONNECT to port 80.

use std::env;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lifl_common::config::mask;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// A server that says nothing for so long is taken for gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// Redirects that are followed.
const MOST_REDIRECTS: usize = 10;

/// Bytes of the longest head of an answer.
const MOST_HEAD_BYTES: u64 = 64 << 10;

const AGENT: &str = concat!("lifl/", env!("CARGO_PKG_VERSION"));

/// Why there is no answer. No secret is in its words.
pub(super) type Failed = Box<dyn Error + Send + Sync>;

/// A server's answer.
pub(super) struct Answer {
    status: u16,
    location: Option<String>,
    /// Bytes that the body has, if the server says so.
    pub(super) length: Option<u64>,
    /// How the body is packed, if it is.
    pub(super) encoding: Option<String>,
    pub(super) body: Box<dyn Read>,
}

/// A URL in its parts.
#[derive(Debug)]
struct Url<'a> {
    https: bool,
    /// `user:password`, as it stands there.
    user: Option<&'a str>,
    /// The host, and the port if it is given.
    authority: &'a str,
    /// From the slash on, without a fragment.
    path: &'a str,
}

impl<'a> Url<'a> {
    fn parse(url: &'a str) -> Result<Self, Failed> {
        let wrong = || format!("{} is no http(s) URL", mask(url));
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let https = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(wrong().into()),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (user, authority) = match authority.rsplit_once('@') {
            Some((user, authority)) => (Some(user), authority),
            None => (None, authority),
        };
        let url = Self {
            https,
            user,
            authority,
            path,
        };
        if url.host().is_empty() || url.port().is_none() {
            return Err(format!(
                "{}: an escaped user and password, a host and a port are expected",
                wrong()
            )
            .into());
        }
        Ok(url)
    }

    fn host(&self) -> &'a str {
        let host = match self.authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => host,
            _ => self.authority,
        };
        host.trim_start_matches('[').trim_end_matches(']')
    }

    fn port(&self) -> Option<u16> {
        match self.authority.rsplit_once(':') {
            Some((_, port)) if !port.ends_with(']') => port.parse().ok(),
            _ => Some(if self.https { 443 } else { 80 }),
        }
    }

    /// Without the user, as a request has it.
    fn bare(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let slash = if self.path.starts_with('/') { "" } else { "/" };
        format!("{scheme}://{}{slash}{}", self.authority, self.path)
    }

    fn same_server(&self, other: &Url<'_>) -> bool {
        (self.https, self.host(), self.port()) == (other.https, other.host(), other.port())
    }

    /// What a redirect from here leads to.
    fn join(&self, location: &str) -> String {
        let scheme = if self.https { "https" } else { "http" };
        if location.contains("://") {
            location.to_owned()
        } else if location.starts_with("//") {
            format!("{scheme}:{location}")
        } else if location.starts_with('/') {
            format!("{scheme}://{}{location}", self.authority)
        } else {
            let path = self.path.split('?').next().unwrap_or_default();
            let folder = path.rfind('/').map_or("/", |slash| &path[..=slash]);
            format!("{scheme}://{}{folder}{location}", self.authority)
        }
    }
}

/// Asks for a URL and follows redirects.
///
/// # Errors
/// If there is no answer, or one that is no success.
pub(super) fn get(given: &str) -> Result<Answer, Failed> {
    let first = Url::parse(given)?;
    let mut seen = Vec::new();
    let mut url = given.to_owned();
    loop {
        let here = Url::parse(&url)?;
        // A password is for the server that it was given for.
        let user = here.user.or(first.user.filter(|_| here.same_server(&first)));
        let answer = request(&here, user)?;
        let next = match (answer.status, answer.location.as_deref()) {
            (301 | 302 | 303 | 307 | 308, Some(location)) => here.join(location),
            (200, _) => return Ok(answer),
            (status, _) => return Err(refused(status, &url).into()),
        };
        if here.https && next.to_ascii_lowercase().starts_with("http://") {
            return Err(format!(
                "it redirects to {}, which is not encrypted: give that URL if its file is to be trusted (and its sha256)",
                mask(&next)
            )
            .into());
        }
        seen.push(here.bare());
        if seen.len() > MOST_REDIRECTS || Url::parse(&next).is_ok_and(|next| seen.contains(&next.bare())) {
            return Err(format!(
                "it redirects in a circle, or more than {MOST_REDIRECTS} times: {}",
                mask(&next)
            )
            .into());
        }
        url = next;
    }
}

fn refused(status: u16, url: &str) -> String {
    let meaning = match status {
        401 | 403 => "the server wants a user and password or a token, or does not let this machine have it",
        404 | 410 => "there is no such file",
        407 => "the proxy wants a user and password: http://USER:PASSWORD@PROXY in its variable",
        429 => "the server has been asked too often: try again later",
        500.. => "the server has a fault: try again later",
        _ => "no success",
    };
    format!("{} gives status {status}: {meaning}", mask(url))
}

/// One request, without following anything.
fn request(url: &Url<'_>, user: Option<&str>) -> Result<Answer, Failed> {
    let authorization = user.map(basic);
    let proxy = Proxy::of(url, |name| env::var(name).ok())?;
    let answer = match &proxy {
        Some(proxy) if !url.https && proxy.scheme() == "http" => {
            through_proxy(url, authorization.as_deref(), proxy)
        }
        _ => with_ureq(url, authorization.as_deref(), proxy.as_ref()),
    };
    answer.map_err(|error| match &proxy {
        Some(proxy) => format!(
            "through the proxy {} ({}): {error}",
            mask(&proxy.url),
            proxy.variable
        )
        .into(),
        None => error,
    })
}

fn basic(user: &str) -> String {
    let user = if user.contains(':') {
        user.to_owned()
    } else {
        format!("{user}:")
    };
    format!("Basic {}", BASE64_STANDARD.encode(percent_decoded(&user)))
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = after.get(..2).filter(|_| *first == b'%');
        let escaped =
            escaped.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    bytes
}

fn with_ureq(url: &Url<'_>, authorization: Option<&str>, proxy: Option<&Proxy>) -> Result<Answer, Failed> {
    let said = |error: ureq::Error| -> Failed {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        if url.https && text.to_ascii_lowercase().contains("certificate") {
            text.push_str(
                ": if an own certificate authority signed it, name its file in SSL_CERT_FILE, or add it to the system's store \
                 (update-ca-certificates)",
            );
        }
        text.replace(&url.bare(), &mask(&url.bare())).into()
    };
    let proxy = match proxy {
        Some(proxy) if !matches!(proxy.scheme(), "http" | "https") => {
            return Err("proxies of this kind are not supported: give one of http:// or https://".into());
        }
        Some(proxy) => Some(ureq::Proxy::new(&proxy.url).map_err(said)?),
        None => None,
    };
    let mut config = ureq::Agent::config_builder()
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(AGENT)
        .proxy(proxy);
    if url.https {
        config = config.tls_config(TlsConfig::builder().root_certs(roots()?).build());
    }
    let mut request = ureq::Agent::from(config.build()).get(url.bare());
    if let Some(authorization) = authorization {
        request = request.header("Authorization", authorization);
    }
    let response = request.call().map_err(said)?;
    let header = |name: &str| {
        let value = response.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    Ok(Answer {
        status: response.status().as_u16(),
        location: header("location"),
        length: response.body().content_length(),
        encoding: header("content-encoding"),
        body: Box::new(response.into_body().into_with_config().limit(u64::MAX).reader()),
    })
}

/// The certificates that are trusted: the system's, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name; those of Mozilla's list
/// that ureq has in it where there are none.
fn roots() -> Result<RootCerts, Failed> {
    let loaded = rustls_native_certs::load_native_certs();
    if loaded.certs.is_empty() {
        let named = ["SSL_CERT_FILE", "SSL_CERT_DIR"]
            .into_iter()
            .find(|name| env::var_os(name).is_some_and(|value| !value.is_empty()));
        return match named {
            Some(name) => {
                let errors: Vec<String> = loaded.errors.iter().map(ToString::to_string).collect();
                Err(format!("{name} names no certificates ({})", errors.join(", ")).into())
            }
            None => Ok(RootCerts::WebPki),
        };
    }
    let certificates: Vec<Certificate<'static>> = loaded
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

/// A proxy, and the variable that names it.
#[derive(Debug, PartialEq, Eq)]
struct Proxy {
    url: String,
    variable: &'static str,
}

impl Proxy {
    /// The proxy for a URL; `None` if it is reached directly.
    ///
    /// # Errors
    /// If its variable is no URL.
    fn of(url: &Url<'_>, variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Failed> {
        let names: [&'static str; 4] = if url.https {
            ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
        } else {
            ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
        };
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let Some((name, value)) = names.into_iter().find_map(|name| Some((name, set(name)?))) else {
            return Ok(None);
        };
        let no_proxy = set("no_proxy").or_else(|| set("NO_PROXY")).unwrap_or_default();
        if no_proxy
            .split([',', ' '])
            .any(|pattern| excepts(pattern.trim(), url))
        {
            return Ok(None);
        }
        let value = value.trim();
        let value = if value.contains("://") {
            value.to_owned()
        } else {
            format!("http://{value}")
        };
        Ok(Some(Self {
            url: value,
            variable: name,
        }))
    }

    fn scheme(&self) -> &str {
        self.url.split("://").next().unwrap_or_default()
    }
}

/// Whether an entry of `no_proxy` is of the URL's host: the name or a domain above it, an address, a range of addresses, `*`.
fn excepts(pattern: &str, url: &Url<'_>) -> bool {
    let host = url.host().to_ascii_lowercase();
    let pattern = pattern.to_ascii_lowercase();
    if pattern == "*" {
        return true;
    }
    if let (Some((network, bits)), Ok(address)) = (pattern.split_once('/'), host.parse::<Ipv4Addr>()) {
        let (Ok(network), Ok(bits @ 0..=32)) = (network.parse::<Ipv4Addr>(), bits.parse::<u32>()) else {
            return false;
        };
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        return network.to_bits() & mask == address.to_bits() & mask;
    }
    let (name, port) = match pattern.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
        _ => (pattern.as_str(), None),
    };
    if port.is_some_and(|port| url.port().map(|port| port.to_string()).as_deref() != Some(port)) {
        return false;
    }
    let name = name.trim_start_matches("*.").trim_start_matches('.');
    let name = name.trim_start_matches('[').trim_end_matches(']');
    !name.is_empty()
        && (host == name
            || host
                .strip_suffix(name)
                .is_some_and(|before| before.ends_with('.')))
}

/// Plain http through a proxy. The version is 1.0, so that the body comes as it is and ends with the connection.
fn through_proxy(url: &Url<'_>, authorization: Option<&str>, proxy: &Proxy) -> Result<Answer, Failed> {
    let at = Url::parse(&proxy.url)?;
    let port = at.port().unwrap_or(80);
    let mut addresses = (at.host(), port).to_socket_addrs()?;
    let mut stream = addresses
        .try_fold(None, |found: Option<TcpStream>, address| match found {
            Some(stream) => Ok(Some(stream)),
            None => TcpStream::connect_timeout(&address, PATIENCE).map(Some),
        })?
        .ok_or("it has no address")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = format!(
        "GET {} HTTP/1.0\r\nHost: {}\r\nUser-Agent: {AGENT}\r\nAccept: */*\r\n",
        url.bare(),
        url.authority
    );
    let own = at.user.map(basic);
    for (name, value) in [
        ("Authorization", authorization),
        ("Proxy-Authorization", own.as_deref()),
    ] {
        if let Some(value) = value {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    // What is no part of a request's line would begin another line of it.
    if url.bare().bytes().any(|byte| byte <= b' ') {
        return Err(format!("{} has a space or a control character in it", mask(&url.bare())).into());
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    answer(BufReader::new(stream))
}

/// Reads the head of an answer.
fn answer(mut reader: impl BufRead + 'static) -> Result<Answer, Failed> {
    let mut head = (&mut reader).take(MOST_HEAD_BYTES);
    let mut line = || {
        let mut line = Vec::new();
        head.read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            return Err::<_, Failed>("its answer ends early".into());
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    };
    let first = line()?;
    let status = first
        .strip_prefix("HTTP/")
        .and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    let Some(status) = status else {
        return Err("its answer is not HTTP".into());
    };
    let (mut location, mut length, mut encoding) = (None, None, None);
    loop {
        let line = line()?;
        if line.is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "location" => location = Some(value.to_owned()),
            "content-length" => length = value.parse().ok(),
            "content-encoding" => encoding = Some(value.to_owned()),
            "transfer-encoding" if !value.eq_ignore_ascii_case("identity") => {
                return Err(
                    format!("its answer has the transfer encoding {value}, which nobody asked for").into(),
                );
            }
            _ => {}
        }
    }
    Ok(Answer {
        status,
        location,
        length,
        encoding,
        body: match length {
            Some(length) => Box::new(reader.take(length)),
            None => Box::new(reader),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(url: &str, variables: &[(&str, &str)]) -> Option<Proxy> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Proxy::of(&Url::parse(url).expect("a URL"), variable).expect("a proxy or none")
    }

    #[test]
    fn the_usual_variables_name_the_proxy() {
        let all = [
            ("HTTP_PROXY", "p:1"),
            ("https_proxy", "http://q:2"),
            ("ALL_PROXY", "http://r:3"),
        ];
        assert_eq!(proxy("http://a/x", &all).expect("one").url, "http://p:1");
        assert_eq!(proxy("https://a/x", &all).expect("one").url, "http://q:2");
        assert_eq!(
            proxy("https://a/x", &all[2..]).expect("one").variable,
            "ALL_PROXY"
        );
        assert_eq!(proxy("http://a/x", &[("http_proxy", "")]), None);
        assert_eq!(proxy("http://a/x", &[]), None);
        let excepted = |url: &str, no_proxy: &str| {
            proxy(url, &[("http_proxy", "p:1"), ("no_proxy", no_proxy)]).is_none()
        };
        for no_proxy in [
            "data.example",
            "x, .example",
            "*",
            "EXAMPLE",
            "*.example",
            "data.example:80",
        ] {
            assert!(excepted("http://data.example/x", no_proxy), "{no_proxy}");
        }
        for no_proxy in ["", "ata.example", "other", "data.example:81", "10.0.0.0/8"] {
            assert!(!excepted("http://data.example/x", no_proxy), "{no_proxy}");
        }
        assert!(
            excepted("http://10.1.2.3:80/x", "10.0.0.0/8") && !excepted("http://11.1.2.3/x", "10.0.0.0/8")
        );
        assert!(
            excepted("http://127.0.0.1:9/x", "localhost,127.0.0.1") && excepted("http://[::1]:9/x", "::1")
        );
    }

    #[test]
    fn redirects_lead_where_they_say() {
        let here = Url::parse("https://u:p@a.example:8443/d/x.npz?v=1#f").expect("a URL");
        for (location, to) in [
            ("http://b/y", "http://b/y"),
            ("//b/y", "https://b/y"),
            ("/y?z", "https://a.example:8443/y?z"),
            ("y", "https://a.example:8443/d/y"),
        ] {
            assert_eq!(here.join(location), to);
        }
        assert_eq!(
            (here.host(), here.port(), here.user),
            ("a.example", Some(8443), Some("u:p"))
        );
        assert_eq!(here.bare(), "https://a.example:8443/d/x.npz?v=1");
        let v6 = Url::parse("http://[::1]/x").expect("a URL");
        assert_eq!((v6.host(), v6.port()), ("::1", Some(80)));
        assert_eq!(Url::parse("http://a").expect("a URL").bare(), "http://a/");
        for wrong in ["ftp://a/x", "http:///x", "http://a:b/x", "x"] {
            Url::parse(wrong).expect_err(wrong);
        }
        let secret = Url::parse("http://bob:hun/ter2@host/x")
            .expect_err("no port")
            .to_string();
        assert!(!secret.contains("ter2"), "{secret}");
    }

    #[test]
    fn a_user_is_sent_as_basic_authorization() {
        // RFC 7617, section 2.
        assert_eq!(
            basic("Aladdin:open%20sesame"),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
        assert_eq!(percent_decoded("a%2Fb%zz%"), b"a/b%zz%");
    }
}
