//! The envelope, format 1: the bytes that lie in etcd for years.
//!
//! ```text
//! u8   format = 0x01
//! u8   suite  = 0x01      HKDF-SHA256(DEK) → AES-256-GCM key ‖ 32-byte commitment
//! [16] key set
//! u8   recipients (1..=8), ascending by identity, no two alike
//!      per recipient: [16] KEK identity · u8 wrap algorithm · u16 BE length · wrapped DEK
//! [32] key commitment
//! [12] random nonce
//! [..] ciphertext and 16-byte tag
//! ```
//!
//! A wrapped DEK is what its algorithm says ([`WrapAlgorithm`]), as long as that, and nothing more. The length of number 4
//! tells the size of its keys, which is the KEK's own. Its signature is no matter of the envelope's: the provider, which
//! knows the public key, verifies it before it decrypts.
//!
//! HKDF (RFC 5869, no salt) has the info `trousseau envelope v1` ‖ 0 ‖ every byte before the commitment. The AAD of
//! AES-256-GCM (SP 800-38D) is every byte before the nonce. The commitment is compared before anything is opened, so
//! no envelope opens to two plaintexts under two DEKs, and no header byte can be exchanged.
//!
//! This room is pure: no I/O, no clock, no key but the DEK it is given. The vectors in `tests/vectors/` come from an
//! implementation that shares no code with this one.

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use hkdf::Hkdf;
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::identity::{Identity, KeySet};
use crate::secret::{Dek, Plaintext};

/// The first byte of an envelope of this format.
pub const FORMAT: u8 = 1;
const SUITE: u8 = 1;
const COMMITMENT_LEN: usize = 32;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
const INFO_PREFIX: &[u8] = b"trousseau envelope v1\0";

/// An envelope has at least one recipient and at most this many.
pub const MAX_RECIPIENTS: usize = 8;

/// How a KEK wraps a DEK. The number names the algorithm, never a mechanism code of PKCS#11.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrapAlgorithm {
    /// Number 1: AES-KW (RFC 3394, SP 800-38F), default initial value.
    AesKw,
    /// Number 2: AES-KWP (RFC 5649, SP 800-38F), default initial value.
    AesKwp,
    /// Number 3: AES-256-GCM (SP 800-38D): 12-byte IV ‖ ciphertext ‖ 16-byte tag, the KEK identity as AAD.
    AesGcm,
    /// Number 4: RSA-OAEP (RFC 8017 section 7.1; SHA-256, MGF1 with SHA-256, no label), signed: ciphertext ‖ signature,
    /// each as long as the modulus. The signature is RSASSA-PKCS1-v1_5 with SHA-256 (section 8.2) by the KEK's second
    /// key over `trousseau rsa-oaep v1` ‖ 0 ‖ KEK identity ‖ ciphertext. Here both moduli have 2048 bits.
    RsaOaep2048,
    /// Number 4 with moduli of 3072 bits.
    RsaOaep3072,
    /// Number 5: what the Transit secrets engine of Vault and OpenBao made of the DEK under one version of a key of type
    /// aes256-gcm96: 12-byte nonce ‖ ciphertext ‖ 16-byte tag, the KEK identity as associated data. The text before it,
    /// `vault:vN:`, follows from the KEK.
    Transit,
}

impl WrapAlgorithm {
    /// The one whose wrapped DEK is the longest.
    pub const LONGEST: Self = Self::RsaOaep3072;

    const ALL: [Self; 6] =
        [Self::AesKw, Self::AesKwp, Self::AesGcm, Self::RsaOaep2048, Self::RsaOaep3072, Self::Transit];

    /// The number that stands in an envelope.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::AesKw => 1,
            Self::AesKwp => 2,
            Self::AesGcm => 3,
            Self::RsaOaep2048 | Self::RsaOaep3072 => 4,
            Self::Transit => 5,
        }
    }

    /// Bytes in a wrapped DEK.
    #[must_use]
    pub const fn wrapped_len(self) -> usize {
        match self {
            Self::AesKw | Self::AesKwp => Dek::LEN + 8,
            Self::AesGcm | Self::Transit => NONCE_LEN + Dek::LEN + TAG_LEN,
            Self::RsaOaep2048 => 2 * 2048 / 8,
            Self::RsaOaep3072 => 2 * 3072 / 8,
        }
    }

    /// The one that has this number and makes wrapped DEKs of this length.
    fn read(number: u8, length: u16) -> Result<Self, Malformed> {
        let mut numbered = Self::ALL.into_iter().filter(|algorithm| algorithm.number() == number).peekable();
        numbered.peek().ok_or(Malformed::UnknownAlgorithm(number))?;
        numbered
            .find(|algorithm| algorithm.wrapped_len() == usize::from(length))
            .ok_or(Malformed::WrappedLength(length))
    }
}

/// One KEK under which an envelope's DEK is wrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient<W> {
    /// Which KEK.
    pub identity: Identity,
    /// How it wrapped.
    pub algorithm: WrapAlgorithm,
    /// The wrapped DEK, as long as the algorithm says.
    pub wrapped: W,
}

/// Why some bytes are no envelope of format 1. Nothing was decrypted and no token was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes end inside the field.
    #[error("it ends inside the {0}")]
    Truncated(&'static str),
    /// Not an envelope, or one of a later version.
    #[error("its format {0} is unknown")]
    UnknownFormat(u8),
    /// A later version's cryptography.
    #[error("its suite {0} is unknown")]
    UnknownSuite(u8),
    /// A later version's way to wrap.
    #[error("its wrap algorithm {0} is unknown")]
    UnknownAlgorithm(u8),
    /// None, or more than [`MAX_RECIPIENTS`].
    #[error("it has {0} recipients, not 1 to {MAX_RECIPIENTS}")]
    RecipientCount(u8),
    /// Unsorted or repeated.
    #[error("its recipients are not in ascending order, each once")]
    RecipientOrder,
    /// No wrapped DEK of that algorithm has this length.
    #[error("a wrapped DEK of {0} bytes does not fit its algorithm")]
    WrappedLength(u16),
}

/// The bytes were changed after they were sealed, or sealed under another DEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the envelope does not open under its DEK")]
pub struct Damaged;

/// The longest plaintext that fits in an envelope of `limit` bytes with these recipients.
#[must_use]
pub fn plaintext_limit(limit: usize, recipients: &[WrapAlgorithm]) -> usize {
    limit.saturating_sub(sealed_len(recipients, 0))
}

/// Bytes in the envelope of a plaintext of `plaintext_len` bytes.
#[must_use]
pub fn sealed_len(recipients: &[WrapAlgorithm], plaintext_len: usize) -> usize {
    let recipients: usize = recipients.iter().map(|algorithm| Identity::LEN + 3 + algorithm.wrapped_len()).sum();
    3 + KeySet::LEN + recipients + COMMITMENT_LEN + NONCE_LEN + plaintext_len + TAG_LEN
}

/// Why nothing was sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The operating system has no randomness to give.
    #[error("getrandom(2) failed: {0}")]
    Randomness(#[from] getrandom::Error),
    /// None, more than [`MAX_RECIPIENTS`], or one twice: [`Envelope::parse`] would refuse the result.
    #[error("an envelope has 1 to {MAX_RECIPIENTS} recipients, each once")]
    Recipients,
    /// Past what AES-GCM can seal under one nonce, 64 GiB.
    #[error("the plaintext is too long for AES-GCM")]
    TooLong,
}

/// Seals `plaintext` under `dek`, which the recipients' KEKs have wrapped, with a random nonce.
///
/// # Errors
/// [`SealError`]: nothing was sealed.
pub fn seal(
    key_set: KeySet,
    recipients: Vec<Recipient<Vec<u8>>>,
    dek: &Dek,
    plaintext: &[u8],
) -> Result<Vec<u8>, SealError> {
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce)?;
    seal_with_nonce(key_set, recipients, dek, nonce, plaintext)
}

fn seal_with_nonce(
    key_set: KeySet,
    mut recipients: Vec<Recipient<Vec<u8>>>,
    dek: &Dek,
    nonce: [u8; NONCE_LEN],
    plaintext: &[u8],
) -> Result<Vec<u8>, SealError> {
    recipients.sort_unstable_by_key(|recipient| recipient.identity);
    let each_once = recipients.is_sorted_by(|one, next| one.identity < next.identity);
    if !each_once || !(1..=MAX_RECIPIENTS).contains(&recipients.len()) {
        return Err(SealError::Recipients);
    }
    let algorithms: Vec<WrapAlgorithm> = recipients.iter().map(|recipient| recipient.algorithm).collect();

    // With the whole capacity from the start, no growth leaves a copy of the plaintext behind.
    let mut envelope = Vec::with_capacity(sealed_len(&algorithms, plaintext.len()));
    envelope.extend([FORMAT, SUITE]);
    envelope.extend(key_set.as_bytes());
    envelope.push(recipients.len() as u8);
    for Recipient { identity, algorithm, wrapped } in &recipients {
        envelope.extend(identity.as_bytes());
        envelope.push(algorithm.number());
        envelope.extend((wrapped.len() as u16).to_be_bytes());
        envelope.extend(wrapped);
    }
    let keys = Keys::derive(dek, &envelope);
    envelope.extend(&*keys.commitment);
    let aad_len = envelope.len();
    envelope.extend(nonce);
    envelope.extend(plaintext);
    let (aad, rest) = envelope.split_at_mut(aad_len);
    let (_nonce, sealed) = rest.split_at_mut(NONCE_LEN);
    let tag =
        keys.cipher.encrypt_inout_detached(&Nonce::from(nonce), aad, sealed.into()).map_err(|_| SealError::TooLong)?;
    envelope.extend(tag);
    Ok(envelope)
}

/// A well-formed envelope: every length, order and number is checked, nothing is decrypted yet.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// The key set under which it was sealed.
    pub key_set: KeySet,
    /// The KEKs that can unwrap its DEK, ascending by identity.
    pub recipients: Vec<Recipient<&'a [u8]>>,
    header: &'a [u8],
    aad: &'a [u8],
    commitment: &'a [u8; COMMITMENT_LEN],
    nonce: &'a [u8; NONCE_LEN],
    ciphertext: &'a [u8],
    tag: &'a [u8; TAG_LEN],
}

impl<'a> Envelope<'a> {
    /// Reads an envelope.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong with the bytes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = Reader(bytes);
        let format = rest.byte("format")?;
        if format != FORMAT {
            return Err(Malformed::UnknownFormat(format));
        }
        let suite = rest.byte("suite")?;
        if suite != SUITE {
            return Err(Malformed::UnknownSuite(suite));
        }
        let key_set = KeySet::from_bytes(*rest.array("key set")?);
        let recipients = read_recipients(&mut rest)?;
        let header = rest.consumed_of(bytes);
        let commitment = rest.array("commitment")?;
        let aad = rest.consumed_of(bytes);
        let nonce = rest.array("nonce")?;
        let (ciphertext, tag) = rest.0.split_last_chunk().ok_or(Malformed::Truncated("tag"))?;
        if ciphertext.is_empty() {
            return Err(Malformed::Truncated("ciphertext")); // nothing empty was ever sealed
        }
        Ok(Self { key_set, recipients, header, aad, commitment, nonce, ciphertext, tag })
    }

    /// Opens the envelope with its unwrapped DEK.
    ///
    /// # Errors
    /// [`Damaged`]: a byte was changed, or this is not the DEK. Which of them is not told.
    pub fn open(&self, dek: &Dek) -> Result<Plaintext, Damaged> {
        let keys = Keys::derive(dek, self.header);
        if !bool::from(keys.commitment.ct_eq(self.commitment)) {
            return Err(Damaged);
        }
        let mut plaintext = Zeroizing::new(self.ciphertext.to_vec());
        keys.cipher
            .decrypt_inout_detached(
                &Nonce::from(*self.nonce),
                self.aad,
                plaintext.as_mut_slice().into(),
                &Tag::from(*self.tag),
            )
            .map_err(|_| Damaged)?;
        Ok(plaintext)
    }
}

fn read_recipients<'a>(rest: &mut Reader<'a>) -> Result<Vec<Recipient<&'a [u8]>>, Malformed> {
    let count = rest.byte("number of recipients")?;
    if !(1..=MAX_RECIPIENTS).contains(&usize::from(count)) {
        return Err(Malformed::RecipientCount(count));
    }
    let mut recipients: Vec<Recipient<&[u8]>> = Vec::with_capacity(count.into());
    for _ in 0..count {
        let identity = Identity::from_bytes(*rest.array("KEK identity")?);
        if recipients.last().is_some_and(|last| last.identity >= identity) {
            return Err(Malformed::RecipientOrder);
        }
        let number = rest.byte("wrap algorithm")?;
        let length = u16::from_be_bytes(*rest.array("wrapped DEK's length")?);
        let algorithm = WrapAlgorithm::read(number, length)?;
        let wrapped = rest.bytes(length.into(), "wrapped DEK")?;
        recipients.push(Recipient { identity, algorithm, wrapped });
    }
    Ok(recipients)
}

/// What HKDF makes of a DEK: the cipher's key, and the commitment to it.
struct Keys {
    cipher: Aes256Gcm,
    commitment: Zeroizing<[u8; COMMITMENT_LEN]>,
}

impl Keys {
    /// `header` is every byte of the envelope before the commitment.
    fn derive(dek: &Dek, header: &[u8]) -> Self {
        let mut okm = Zeroizing::new([[0; 32]; 2]);
        let derived =
            Hkdf::<Sha256>::new(None, dek.expose()).expand_multi_info(&[INFO_PREFIX, header], okm.as_flattened_mut());
        debug_assert!(derived.is_ok(), "64 bytes are within HKDF-SHA256's 8,160");
        let [key, commitment] = &*okm;
        Self { cipher: Aes256Gcm::new(key.into()), commitment: Zeroizing::new(*commitment) }
    }
}

/// The bytes that are left to read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, length: usize, field: &'static str) -> Result<&'a [u8], Malformed> {
        let (read, rest) = self.0.split_at_checked(length).ok_or(Malformed::Truncated(field))?;
        self.0 = rest;
        Ok(read)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<&'a [u8; N], Malformed> {
        let (read, rest) = self.0.split_first_chunk().ok_or(Malformed::Truncated(field))?;
        self.0 = rest;
        Ok(read)
    }

    fn byte(&mut self, field: &'static str) -> Result<u8, Malformed> {
        self.array(field).map(|[byte]| *byte)
    }

    /// The part of `all`, which this reader began with, that has been read.
    fn consumed_of(&self, all: &'a [u8]) -> &'a [u8] {
        all.get(..all.len() - self.0.len()).unwrap_or(all)
    }
}

#[cfg(test)]
mod tests;
