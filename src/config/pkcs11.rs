//! `[[provider]]` of type `pkcs11`: a module, its tokens, and what is known of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use super::profile::SESSIONS_BESIDE;
use super::{Check, ConfigError, Credential, Exportable, Profile, TokenUri, file};
use crate::envelope::WrapAlgorithm;

/// A `[[provider.kek]]`: a KEK made elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its activation instant.
    pub not_before: Timestamp,
    /// Why it is a KEK although the token does not vouch for its history.
    pub exception: Option<String>,
}

/// One `[[provider]]` of type `pkcs11`.
#[derive(Debug)]
pub struct Pkcs11Config {
    /// For people; renaming is harmless.
    pub name: String,
    /// Whether its active KEK wraps new DEKs; otherwise its KEKs only unwrap.
    pub seal: bool,
    /// What is known of its tokens.
    pub profile: Arc<Profile>,
    /// The module's file. It need not exist yet.
    pub module: PathBuf,
    /// The tokens, replicas of each other, in the order of preference: at least one.
    pub tokens: Vec<TokenUri>,
    /// CKA_LABEL of the KEKs.
    pub label: String,
    /// The user PIN.
    pub pin: Credential,
    /// Sessions, and so worker threads, a token: 1 to 256.
    pub sessions: usize,
    /// KEKs made elsewhere, by CKA_ID.
    pub admitted: BTreeMap<Vec<u8>, Admission>,
    /// `[policy]`: what becomes of a token that hands keys out.
    pub exportable: Exportable,
}

impl Pkcs11Config {
    /// The wrap algorithm of its modes that makes the longest recipient.
    #[must_use]
    pub fn longest_algorithm(&self) -> WrapAlgorithm {
        let algorithms = self.profile.modes.iter().map(|mode| mode.algorithm());
        algorithms.max_by_key(|algorithm| algorithm.wrapped_len()).unwrap_or(WrapAlgorithm::LONGEST)
    }
}

impl Check<'_> {
    pub(super) fn pkcs11(
        &self,
        file: file::Provider,
        cluster: &str,
        exportable: Exportable,
    ) -> Result<Pkcs11Config, ConfigError> {
        let name = file.name;
        let wrong =
            |field: &str, what: &str, remedy: &str| self.error(format!("provider {name}: {field}: {what}"), remedy);
        let profile = match (&file.profile, &file.module) {
            (Some(profile), _) => Profile::load(profile, &self.profiles, self.path)?,
            (None, Some(module)) => Profile::of_module(module, &self.profiles, self.path)?,
            (None, None) => return Err(wrong("profile", "not named, and no module either", "name the token's family")),
        };
        let module = match file.module.or_else(|| profile.find_module().cloned()) {
            Some(module) if module.is_absolute() => module,
            Some(module) => {
                return Err(wrong("module", &format!("`{}` is relative", module.display()), "write the whole path"));
            }
            None => {
                let paths: Vec<_> = profile.module_paths.iter().map(|path| path.display().to_string()).collect();
                let what = match paths.as_slice() {
                    [] => format!("the profile {} knows no module", profile.name),
                    paths => format!("{} is not installed: none of {} exists", profile.title, paths.join(", ")),
                };
                return Err(wrong("module", &what, "install it, and name its file with `module = …`"));
            }
        };
        let tokens: Vec<TokenUri> = file
            .tokens
            .unwrap_or_default()
            .iter()
            .map(|text| {
                text.parse().map_err(|what: String| {
                    wrong("tokens", &format!("`{text}`: {what}"), "write for example \"pkcs11:token=trousseau\"")
                })
            })
            .collect::<Result<_, _>>()?;
        if tokens.is_empty() {
            return Err(wrong("tokens", "no token is named", "write for example [\"pkcs11:token=trousseau\"]"));
        }
        if let Some((_, twice)) =
            tokens.iter().enumerate().find(|(at, uri)| tokens.iter().take(*at).any(|first| first == *uri))
        {
            let what = format!("{twice} stands there twice, and is no replica of itself");
            return Err(wrong("tokens", &what, "name each token once"));
        }
        let sessions = file.sessions.unwrap_or(4);
        if !(1..=256).contains(&sessions) {
            return Err(wrong("sessions", "not a number from 1 to 256", "4 is a good start"));
        }
        let room = profile.max_sessions.map(|most| (most, most.saturating_sub(SESSIONS_BESIDE)));
        if let Some((most, room)) = room.filter(|(_, room)| sessions > *room) {
            let what = format!(
                "the tokens of profile {} give {most} sessions, and {SESSIONS_BESIDE} are open beside those that work",
                profile.name
            );
            return Err(wrong("sessions", &what, &format!("write {room} at most")));
        }
        let pin_file =
            file.pin_file.ok_or_else(|| wrong("pin-file", "not there", "name the file that holds the user PIN"))?;
        let pin = Credential::parse(&pin_file).map_err(|(what, remedy)| wrong("pin-file", &what, remedy))?;
        let admitted = file.kek.into_iter().map(|kek| self.admitted(&name, &kek)).collect::<Result<_, _>>()?;
        let label = file.label.unwrap_or_else(|| format!("trousseau-{cluster}"));
        Ok(Pkcs11Config {
            seal: file.seal,
            profile: Arc::new(profile),
            module,
            tokens,
            label,
            pin,
            sessions,
            admitted,
            exportable,
            name,
        })
    }

    fn admitted(&self, provider: &str, kek: &file::AdmittedKek) -> Result<(Vec<u8>, Admission), ConfigError> {
        let id = base16ct::lower::decode_vec(&kek.id).ok().filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| {
            let what = format!("provider {provider}: kek.id `{}` is not a CKA_ID in lower-case hex digits", kek.id);
            self.error(what, "`trousseau key list` shows the ids of all keys with the label")
        })?;
        let not_before = kek.not_before.to_string().parse().map_err(|_| {
            let what = format!("provider {provider}: kek.not-before `{}` is not an instant", kek.not_before);
            self.error(what, "write it with its zone, for example 2026-11-23T00:00:00Z")
        })?;
        let said = |why: &&String| !why.trim().is_empty() && why.len() <= 200 && !why.contains(char::is_control);
        if let Some(why) = kek.exception.as_ref().filter(|why| !said(why)) {
            let what = format!("provider {provider}: kek.exception `{}` is not a reason", why.escape_debug());
            return Err(self.error(what, "say in at most 200 letters of one line where the key was before"));
        }
        Ok((id, Admission { not_before, exception: kek.exception.clone() }))
    }
}
