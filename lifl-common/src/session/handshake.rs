//! The handshake: both ends prove that they know the participant's secret, before anything else is said or read.
//!
//! ```text
//!   worker                                            gateway
//!     ├── hello: version, participant, nonce ───────▶ │
//!     │◀───── challenge: version, nonce, proof ───────┤   the same for a participant that nobody knows, with a proof
//!     ├── proof ────────────────────────────────────▶ │   that fits no secret
//!     │◀───── welcome, and all that follows: sealed ──┤
//! ```
//!
//! A proof is HMAC-SHA-256 of the secret over the transcript: the protocol's version, the job, the participant's name and id,
//! the process, both nonces, and the channel (for MQTT the session's number), each with its length in front. The keys that
//! seal what follows come of the same. So what was recorded fits no other handshake, whose nonces are new; a proof of one end
//! is none of the other; and two ends that understood different versions do not agree.
//!
//! The first messages have fixed lengths, and nothing but those bytes is read of a peer that has not proved itself.

use sha2::{Digest, Sha256};

use super::seal::{SealKey, SessionKeys};
use super::secret::{ParticipantId, Secret, random};
use super::{MAGIC, VERSION};

pub(super) const HELLO: u8 = 1;
pub(super) const CHALLENGE: u8 = 13;
pub(super) const PROOF: u8 = 14;

const NONCE_BYTES: usize = 32;
const MAC_BYTES: usize = 32;

/// A hello's length, with its kind.
pub const HELLO_BYTES: usize = 1 + MAGIC.len() + 2 + ParticipantId::BYTES + 8 + NONCE_BYTES;

/// A challenge's length, with its kind.
pub const CHALLENGE_BYTES: usize = 1 + 2 + NONCE_BYTES + MAC_BYTES;

/// A proof's length, with its kind.
pub const PROOF_BYTES: usize = 1 + MAC_BYTES;

/// Where a session takes place, as its handshake binds it: its number over MQTT, else 0.
pub type Channel = u64;

/// Why a handshake came to nothing.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum HandshakeError {
    /// Bytes that are no such message.
    #[error("no LIFL session begins like this")]
    Unknown,
    /// The other end has another version.
    #[error("the other end speaks version {theirs} of the session protocol, this program {VERSION}")]
    Version {
        /// The other end's.
        theirs: u16,
    },
    /// The other end does not know the participant's secret.
    #[error("the other end does not know this participant's secret")]
    Proof,
}

/// A worker's first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who it says it is.
    pub participant: ParticipantId,
    /// Random; the same in all sessions of one process.
    pub instance: u64,
    nonce: [u8; NONCE_BYTES],
}

/// Whom a gateway expects.
#[derive(Clone, Debug)]
pub struct Participant {
    /// Its name in the job.
    pub name: String,
    /// What it proves itself by.
    pub secret: Secret,
}

/// A worker's side.
#[derive(Debug)]
pub struct WorkerHandshake<'a> {
    secret: &'a Secret,
    name: &'a str,
    channel: Channel,
    hello: Hello,
}

/// A gateway's side, once it has answered a hello.
#[derive(Debug)]
pub struct GatewayHandshake {
    /// What the worker has to say; `None` for one that nobody knows.
    expected: Option<([u8; MAC_BYTES], SessionKeys)>,
}

impl Hello {
    /// Kind and fields.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        self.with_version(VERSION)
    }

    /// As of another version.
    fn with_version(&self, version: u16) -> [u8; HELLO_BYTES] {
        join(&[
            &[HELLO],
            &MAGIC,
            &version.to_le_bytes(),
            &self.participant.0,
            &self.instance.to_le_bytes(),
            &self.nonce,
        ])
    }

    /// Reads kind and fields back.
    ///
    /// # Errors
    /// If it is no hello of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, HandshakeError> {
        let bytes: &[u8; HELLO_BYTES] = bytes.try_into().map_err(|_| HandshakeError::Unknown)?;
        let mut rest = &bytes[..];
        if take::<1>(&mut rest)? != [HELLO] || take(&mut rest)? != MAGIC {
            return Err(HandshakeError::Unknown);
        }
        let theirs = u16::from_le_bytes(take(&mut rest)?);
        if theirs != VERSION {
            return Err(HandshakeError::Version { theirs });
        }
        Ok(Self {
            participant: ParticipantId(take(&mut rest)?),
            instance: u64::from_le_bytes(take(&mut rest)?),
            nonce: take(&mut rest)?,
        })
    }

    fn agreement(
        &self,
        theirs: &[u8; NONCE_BYTES],
        secret: &Secret,
        name: &str,
        channel: Channel,
    ) -> Agreement {
        let mut transcript = Sha256::new();
        for field in [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &secret.job().0,
            name.as_bytes(),
            &self.participant.0,
            &self.instance.to_le_bytes(),
            &channel.to_le_bytes(),
            &self.nonce,
            theirs,
        ] {
            transcript.update((field.len() as u64).to_le_bytes());
            transcript.update(field);
        }
        let transcript: [u8; 32] = transcript.finalize().into();
        let of = |purpose| secret.derive(purpose, &[&transcript]);
        Agreement {
            gateway: of("gateway's proof"),
            worker: of("worker's proof"),
            keys: SessionKeys {
                up: SealKey::new(&of("key up")),
                down: SealKey::new(&of("key down")),
            },
        }
    }
}

/// What both ends compute of a handshake.
struct Agreement {
    gateway: [u8; MAC_BYTES],
    worker: [u8; MAC_BYTES],
    keys: SessionKeys,
}

impl<'a> WorkerHandshake<'a> {
    /// Begins one, with a nonce of its own.
    pub fn new(secret: &'a Secret, name: &'a str, instance: u64, channel: Channel) -> Self {
        let hello = Hello {
            participant: secret.id(),
            instance,
            nonce: random(),
        };
        Self {
            secret,
            name,
            channel,
            hello,
        }
    }

    /// The first message.
    pub fn hello(&self) -> [u8; HELLO_BYTES] {
        self.hello.encode()
    }

    /// The answer to a challenge, and the session's keys.
    ///
    /// # Errors
    /// If it does not come from a gateway that knows the secret.
    pub fn answer(&self, challenge: &[u8]) -> Result<([u8; PROOF_BYTES], SessionKeys), HandshakeError> {
        let challenge: &[u8; CHALLENGE_BYTES] = challenge.try_into().map_err(|_| HandshakeError::Unknown)?;
        let mut rest = &challenge[..];
        if take::<1>(&mut rest)? != [CHALLENGE] {
            return Err(HandshakeError::Unknown);
        }
        let theirs = u16::from_le_bytes(take(&mut rest)?);
        if theirs != VERSION {
            return Err(HandshakeError::Version { theirs });
        }
        let nonce = take(&mut rest)?;
        let agreement = self.hello.agreement(&nonce, self.secret, self.name, self.channel);
        if !equal(&agreement.gateway, rest) {
            return Err(HandshakeError::Proof);
        }
        Ok((join(&[&[PROOF], &agreement.worker]), agreement.keys))
    }
}

impl GatewayHandshake {
    /// Answers a hello by a challenge, whether the participant is known or not.
    pub fn answer(
        hello: &Hello,
        known: Option<&Participant>,
        channel: Channel,
    ) -> (Self, [u8; CHALLENGE_BYTES]) {
        let nonce: [u8; NONCE_BYTES] = random();
        let agreement = known.map(|known| hello.agreement(&nonce, &known.secret, &known.name, channel));
        let proof = agreement
            .as_ref()
            .map_or_else(random, |agreement| agreement.gateway);
        let challenge = join(&[&[CHALLENGE], &VERSION.to_le_bytes(), &nonce, &proof]);
        let expected = agreement.map(|agreement| (agreement.worker, agreement.keys));
        (Self { expected }, challenge)
    }

    /// The session's keys, if that is the worker's proof.
    pub fn check(&self, proof: &[u8]) -> Option<SessionKeys> {
        let (kind, proof) = proof.split_first()?;
        let (expected, keys) = self.expected.as_ref()?;
        (*kind == PROOF && equal(expected, proof)).then(|| keys.clone())
    }
}

/// Whether they are the same bytes. Takes the same time wherever they differ.
fn equal(one: &[u8; MAC_BYTES], other: &[u8]) -> bool {
    other.len() == one.len()
        && one
            .iter()
            .zip(other)
            .fold(0, |bits, (a, b)| std::hint::black_box(bits | (a ^ b)))
            == 0
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], HandshakeError> {
    let (first, after) = rest.split_first_chunk::<N>().ok_or(HandshakeError::Unknown)?;
    *rest = after;
    Ok(*first)
}

/// The parts, one after the other; together they are as long as the whole.
fn join<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut whole = [0; N];
    let mut rest = &mut whole[..];
    for part in parts {
        let (place, after) = rest.split_at_mut(part.len());
        place.copy_from_slice(part);
        rest = after;
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::super::JobToken;
    use super::*;

    fn known(token: &JobToken, name: &str) -> Participant {
        Participant {
            name: name.to_owned(),
            secret: token.participant(name),
        }
    }

    #[test]
    fn ends_that_know_the_secret_agree() {
        let token = JobToken::new();
        let (one, secret) = (known(&token, "one"), token.participant("one"));
        let worker = WorkerHandshake::new(&secret, "one", 7, 0);
        let hello = Hello::decode(&worker.hello()).expect("a hello");
        assert_eq!((hello.participant, hello.instance), (secret.id(), 7));
        let (gateway, challenge) = GatewayHandshake::answer(&hello, Some(&one), 0);
        let (proof, theirs) = worker.answer(&challenge).expect("a gateway's");
        let ours = gateway.check(&proof).expect("the worker's");
        assert_eq!(ours.up.seal(1, b"x"), theirs.up.seal(1, b"x"));
        assert_eq!(ours.down.seal(1, b"x"), theirs.down.seal(1, b"x"));
        // What one end says is nothing that the other could have said.
        assert_ne!(ours.up.seal(1, b"x"), ours.down.seal(1, b"x"));
    }

    #[test]
    fn what_was_recorded_fits_no_other_handshake() {
        let token = JobToken::new();
        let (one, secret) = (known(&token, "one"), token.participant("one"));
        let worker = WorkerHandshake::new(&secret, "one", 7, 0);
        let hello = Hello::decode(&worker.hello()).expect("a hello");
        let (first, challenge) = GatewayHandshake::answer(&hello, Some(&one), 0);
        let (proof, keys) = worker.answer(&challenge).expect("a gateway's");
        assert!(first.check(&proof).is_some());
        // The same hello and the same proof, to a gateway that asks anew.
        let (second, asked) = GatewayHandshake::answer(&hello, Some(&one), 0);
        assert_ne!(asked, challenge);
        assert!(second.check(&proof).is_none());
        // The recorded challenge, to a worker that begins anew.
        let again = WorkerHandshake::new(&secret, "one", 7, 0);
        assert_eq!(again.answer(&challenge).err(), Some(HandshakeError::Proof));
        let (_, asked) =
            GatewayHandshake::answer(&Hello::decode(&again.hello()).expect("a hello"), Some(&one), 0);
        let (_, others) = again.answer(&asked).expect("a gateway's");
        assert_ne!(others.up.seal(1, b"x"), keys.up.seal(1, b"x"));
    }

    #[test]
    fn a_secret_is_of_one_name_in_one_job() {
        let (token, other_job) = (JobToken::new(), JobToken::new());
        let mine = token.participant("one");
        for whom in [known(&token, "two"), known(&other_job, "one")] {
            assert_ne!(whom.secret.id(), mine.id());
            // With one's own secret, under the id of another.
            let mut worker = WorkerHandshake::new(&mine, "one", 1, 0);
            worker.hello.participant = whom.secret.id();
            let hello = Hello::decode(&worker.hello()).expect("a hello");
            let (gateway, challenge) = GatewayHandshake::answer(&hello, Some(&whom), 0);
            assert!(worker.answer(&challenge).is_err());
            let nonce = challenge[3..3 + NONCE_BYTES].try_into().expect("a nonce");
            let agreement = hello.agreement(&nonce, &mine, &whom.name, 0);
            let proof: [u8; PROOF_BYTES] = join(&[&[PROOF], &agreement.worker]);
            assert!(gateway.check(&proof).is_none());
        }
    }

    #[test]
    fn neither_end_takes_its_own_proof_from_the_other() {
        let token = JobToken::new();
        let (one, secret) = (known(&token, "one"), token.participant("one"));
        let worker = WorkerHandshake::new(&secret, "one", 7, 0);
        let hello = Hello::decode(&worker.hello()).expect("a hello");
        let (gateway, challenge) = GatewayHandshake::answer(&hello, Some(&one), 0);
        let back: [u8; PROOF_BYTES] = join(&[&[PROOF], &challenge[3 + NONCE_BYTES..]]);
        assert!(gateway.check(&back).is_none());
    }

    #[test]
    fn who_is_not_known_is_asked_the_same_and_never_let_in() {
        let token = JobToken::new();
        let secret = token.participant("one");
        let worker = WorkerHandshake::new(&secret, "one", 7, 0);
        let hello = Hello::decode(&worker.hello()).expect("a hello");
        let (gateway, challenge) = GatewayHandshake::answer(&hello, None, 0);
        assert_eq!(challenge.len(), CHALLENGE_BYTES);
        assert_eq!(worker.answer(&challenge).err(), Some(HandshakeError::Proof));
        assert!(gateway.check(&[PROOF; PROOF_BYTES]).is_none());
    }

    #[test]
    fn another_version_name_process_or_channel_gives_another_proof() {
        let token = JobToken::new();
        let (one, secret) = (known(&token, "one"), token.participant("one"));
        let worker = WorkerHandshake::new(&secret, "one", 7, 5);
        let hello = Hello::decode(&worker.hello()).expect("a hello");
        for version in [0, 1, 2, VERSION + 1, u16::MAX] {
            assert_eq!(
                Hello::decode(&hello.with_version(version)),
                Err(HandshakeError::Version { theirs: version })
            );
            let (_, mut challenge) = GatewayHandshake::answer(&hello, Some(&one), 5);
            challenge[1..3].copy_from_slice(&version.to_le_bytes());
            let theirs = HandshakeError::Version { theirs: version };
            assert_eq!(worker.answer(&challenge).err(), Some(theirs));
        }
        let (_, challenge) = GatewayHandshake::answer(&hello, Some(&one), 6);
        assert!(worker.answer(&challenge).is_err(), "another channel");
        let renamed = Participant {
            name: "two".to_owned(),
            ..one.clone()
        };
        let (_, challenge) = GatewayHandshake::answer(&hello, Some(&renamed), 5);
        assert!(worker.answer(&challenge).is_err(), "another name");
        let replaced = Hello { instance: 8, ..hello };
        let (_, challenge) = GatewayHandshake::answer(&replaced, Some(&one), 5);
        assert!(worker.answer(&challenge).is_err(), "another process");
    }

    #[test]
    fn hellos_that_are_cut_longer_or_odd_are_none() {
        let secret = JobToken::new().participant("one");
        let worker = WorkerHandshake::new(&secret, "one", 7, 0);
        let whole = worker.hello();
        for bytes in 0..whole.len() {
            assert_eq!(Hello::decode(&whole[..bytes]), Err(HandshakeError::Unknown));
        }
        assert_eq!(
            Hello::decode(&[&whole[..], &[0]].concat()),
            Err(HandshakeError::Unknown)
        );
        for at in 0..5 {
            let mut odd = whole;
            odd[at] ^= 1;
            assert_eq!(Hello::decode(&odd), Err(HandshakeError::Unknown));
        }
        for bytes in [&[][..], &[PROOF], &[0; PROOF_BYTES], &[PROOF; PROOF_BYTES + 1]] {
            let hello = Hello::decode(&whole).expect("a hello");
            let known = Participant {
                name: "one".to_owned(),
                secret: secret.clone(),
            };
            let (gateway, _) = GatewayHandshake::answer(&hello, Some(&known), 0);
            assert!(gateway.check(bytes).is_none());
            assert_eq!(worker.answer(bytes).err(), Some(HandshakeError::Unknown));
        }
    }
}
