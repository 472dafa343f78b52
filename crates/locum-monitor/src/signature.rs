//! Signed handles: the kernel's handle with a trailer that only a holder of the key could have made.
//!
//! | bytes of the trailer | hold |
//! |---|---|
//! | 0 | the trailer's version, 1 |
//! | 1..4 | 0 |
//! | 4..8 | the key's id |
//! | 8..24 | HMAC-SHA-256, cut to 128 bits |
//!
//! The HMAC is over a version string and, each preceded by its length, the scope, the export's path in the policy, the
//! handle's type and its bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hmac::{Hmac, Mac as _};
use locum_kernel::handle::{Handle, MAX_BYTES};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;

use crate::key_ring::KeyRing;
use crate::keys::{KeyId, Keys};
use crate::session::lock;

/// Bytes of the trailer.
pub(crate) const TRAILER: usize = 24;
const VERSION: u8 = 1;
const MAC_BYTES: usize = 16;

/// What a handle may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be opened.
    Open,
    /// Only to be compared with others (AT_HANDLE_FID): signed so that it never verifies as one to be opened.
    Compare,
}

impl Purpose {
    fn version_string(self) -> &'static [u8] {
        match self {
            Self::Open => b"locum handle 1",
            Self::Compare => b"locum fid 1",
        }
    }
}

/// Signs and verifies the handles of one export of one session.
#[derive(Debug)]
pub(crate) struct Signer {
    ring: Arc<KeyRing>,
    key: Option<KeyId>,
    scope: String,
    export: String,
    begun: Mutex<Arc<Begun>>,
}

/// For each key of those that were there, the HMAC of all that comes before the handle.
struct Begun {
    of: Arc<Keys>,
    codes: BTreeMap<KeyId, [Hmac<Sha256>; 2]>,
}

impl std::fmt::Debug for Begun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Begun").field("keys", &self.codes.keys()).finish_non_exhaustive()
    }
}

impl Begun {
    fn new(keys: Arc<Keys>, scope: &str, export: &str) -> Arc<Self> {
        let codes = keys.iter().map(|(id, key)| {
            let begun = [Purpose::Open, Purpose::Compare].map(|purpose| {
                // A key shorter than a block is filled up with zeros, by the definition of HMAC (RFC 2104).
                let mut block = [0; 64];
                block[..key.secret.0.len()].copy_from_slice(&key.secret.0);
                let mut mac = Hmac::<Sha256>::new(&block.into());
                mac.update(purpose.version_string());
                field(&mut mac, scope.as_bytes());
                field(&mut mac, export.as_bytes());
                mac
            });
            (id, begun)
        });
        let codes = codes.collect();
        Arc::new(Self { of: keys, codes })
    }
}

impl Signer {
    /// Signs with `key`, and with no other: nothing while that is not there. Verifies with every key that is.
    pub(crate) fn new(ring: &Arc<KeyRing>, key: Option<KeyId>, scope: &str, export: &str) -> Self {
        let begun = Begun::new(ring.current(), scope, export);
        Self {
            ring: Arc::clone(ring),
            key,
            scope: scope.to_owned(),
            export: export.to_owned(),
            begun: Mutex::new(begun),
        }
    }

    /// `handle` with its trailer; `None` if [`MAX_BYTES`] leave no room for it, or the key is not there.
    pub(crate) fn sign(&self, handle: &Handle, purpose: Purpose) -> Option<Handle> {
        let key = self.key?;
        let mut trailer = [0; TRAILER];
        trailer[0] = VERSION;
        trailer[4..8].copy_from_slice(&key.0);
        trailer[8..].copy_from_slice(&self.code(key, handle.kind, handle.bytes(), purpose)?);
        handle.with(&trailer)
    }

    /// The kernel's handle in `signed`, if this session was given it for this export, to be opened.
    pub(crate) fn verify(&self, signed: &Handle) -> Option<Handle> {
        let split = signed.bytes().len().checked_sub(TRAILER)?;
        let (bytes, trailer) = signed.bytes().split_at(split);
        let [VERSION, 0, 0, 0, a, b, c, d, code @ ..] = trailer else { return None };
        let right = self.code(KeyId([*a, *b, *c, *d]), signed.kind, bytes, Purpose::Open)?;
        bool::from(right.ct_eq(code)).then(|| Handle::new(signed.kind, bytes))?
    }

    fn code(&self, key: KeyId, kind: i32, bytes: &[u8], purpose: Purpose) -> Option<[u8; MAC_BYTES]> {
        let begun = self.begun();
        let [open, compare] = begun.codes.get(&key)?;
        let mut mac = if purpose == Purpose::Open { open.clone() } else { compare.clone() };
        field(&mut mac, &kind.to_le_bytes());
        field(&mut mac, bytes);
        mac.finalize().into_bytes().first_chunk().copied()
    }

    /// For the keys as they are now.
    fn begun(&self) -> Arc<Begun> {
        let keys = self.ring.current();
        let mut begun = lock(&self.begun);
        if !Arc::ptr_eq(&begun.of, &keys) {
            *begun = Begun::new(keys, &self.scope, &self.export);
        }
        Arc::clone(&begun)
    }
}

fn field(mac: &mut Hmac<Sha256>, bytes: &[u8]) {
    mac.update(&(bytes.len() as u64).to_le_bytes());
    mac.update(bytes);
}

/// The longest handle of the kernel's that leaves room for a trailer.
pub(crate) const MAX_SIGNABLE: usize = MAX_BYTES - TRAILER;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys;

    fn ring() -> (tempfile::TempDir, Arc<KeyRing>) {
        let folder = tempfile::tempdir().unwrap();
        let ring = KeyRing::open(folder.path()).unwrap();
        (folder, Arc::new(ring))
    }

    fn signer(ring: &Arc<KeyRing>, scope: &str, export: &str) -> Signer {
        Signer::new(ring, ring.current().newest(), scope, export)
    }

    fn handle() -> Handle {
        Handle::new(1, b"\x0c\x00\x00\x00\x5a\x11\x22\x33").unwrap()
    }

    #[test]
    fn what_was_signed_verifies_and_is_always_the_same() {
        let (_folder, ring) = ring();
        let signer = signer(&ring, "scope", "/share");
        let made = signer.sign(&handle(), Purpose::Open).unwrap();
        assert_eq!(made.bytes().len(), 8 + TRAILER);
        assert_eq!(signer.verify(&made), Some(handle()));
        assert_eq!(signer.sign(&handle(), Purpose::Open), Some(made));
    }

    #[test]
    fn any_flipped_bit_cut_growth_or_type_is_refused() {
        let (_folder, ring) = ring();
        let signer = signer(&ring, "scope", "/share");
        let made = signer.sign(&handle(), Purpose::Open).unwrap();
        let refused = |kind, bytes: &[u8]| signer.verify(&Handle::new(kind, bytes).unwrap()).is_none();
        for bit in 0..made.bytes().len() * 8 {
            let mut bytes = made.bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(refused(1, &bytes), "bit {bit}");
        }
        for len in 0..made.bytes().len() {
            assert!(refused(1, &made.bytes()[..len]), "{len} bytes");
        }
        assert!(refused(1, &[made.bytes(), &[0]].concat()));
        assert!(refused(2, made.bytes()));
    }

    #[test]
    fn scope_export_key_and_purpose_do_not_mix() {
        let ((_one, ring), (_two, others)) = (ring(), ring());
        let own = signer(&ring, "scope", "/share");
        for other in [
            signer(&ring, "scopf", "/share"),
            signer(&ring, "scope/", "share"),
            signer(&ring, "scope", "/share2"),
            signer(&others, "scope", "/share"),
        ] {
            assert_eq!(own.verify(&other.sign(&handle(), Purpose::Open).unwrap()), None);
        }
        assert_eq!(own.verify(&own.sign(&handle(), Purpose::Compare).unwrap()), None);
    }

    #[test]
    fn a_signer_keeps_its_key_and_without_it_signs_with_no_other() {
        let (folder, ring) = ring();
        let own = signer(&ring, "scope", "/share");
        let sign = |signer: &Signer| signer.sign(&handle(), Purpose::Open);
        let made = sign(&own).unwrap();
        let next = keys::create(folder.path()).unwrap();
        ring.look();
        assert_eq!(sign(&own), Some(made.clone()));
        let theirs = sign(&Signer::new(&ring, Some(next), "scope", "/share")).unwrap();
        assert_ne!(theirs, made);
        assert_eq!(own.verify(&theirs), Some(handle()), "all keys verify");
        let path = folder.path().join(format!("{}.key", own.key.unwrap()));
        let aside = path.with_extension("new");
        std::fs::rename(&path, &aside).unwrap();
        ring.look();
        assert_eq!((sign(&own), own.verify(&made)), (None, None));
        std::fs::rename(&aside, &path).unwrap();
        ring.look();
        assert_eq!((sign(&own), own.verify(&made)), (Some(made), Some(handle())));
        assert_eq!(sign(&Signer::new(&ring, None, "scope", "/share")), None);
    }

    #[test]
    fn the_longest_signable_handle_fits_exactly() {
        let (_folder, ring) = ring();
        let signer = signer(&ring, "s", "/");
        let sign = |len| signer.sign(&Handle::new(1, &vec![9; len]).unwrap(), Purpose::Open);
        assert!(sign(MAX_SIGNABLE).is_some());
        assert!(sign(MAX_SIGNABLE + 1).is_none());
    }
}
