//! What a token says of a key, and what is asked of it when one is made, as people read it: by the names of PKCS#11.

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, KeyType, ObjectClass};

use super::admission::{self, KekSpec, Said};
use super::{oaep, raw};
use crate::config::{Mode, Profile};
use crate::provider::{Attributes, Value};

/// What is asked of the token when a KEK is made: 256-bit AES that never leaves it, and whose attributes nobody changes.
/// In the mode `oaep` the private key that decrypts; the one that signs is like it.
pub(super) fn template(profile: &Profile, kek: &KekSpec) -> Vec<Attribute> {
    if kek.mode == Mode::Oaep {
        return oaep::template(profile, kek, true);
    }
    let wraps_objects = kek.mode.wraps_objects();
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(32.into()),
        Attribute::Label(kek.label.clone().into_bytes()),
        Attribute::Id(kek.id.clone()),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Wrap(wraps_objects),
        Attribute::Unwrap(wraps_objects),
        Attribute::Encrypt(!wraps_objects),
        Attribute::Decrypt(!wraps_objects),
        Attribute::Sign(false),
        Attribute::Verify(false),
        Attribute::Derive(false),
        // The token itself then refuses every other use of the key, such as CBC or ECB.
        Attribute::AllowedMechanisms(vec![raw::mechanism_type(profile.mechanism(kek.mode))]),
    ];
    omit(profile, &mut template);
    template
}

/// Leaves out what the token lets nobody set.
pub(super) fn omit(profile: &Profile, template: &mut Vec<Attribute>) {
    let omitted: Vec<_> = profile.omit_attributes.iter().copied().map(admission::omitted).collect();
    template.retain(|attribute| !omitted.contains(&attribute.attribute_type()));
}

impl Said {
    /// The attributes that decide what can be done with a key.
    pub(super) fn attributes(&self) -> Attributes {
        let is_shown = |name: &str| !["CLASS", "KEY_TYPE", "VALUE_LEN", "ID"].contains(&name);
        readable(&self.0).into_iter().filter(|(name, _)| is_shown(name)).collect()
    }
}

/// Attributes by their names without CKA_, in the same order; those that have no name here are left out.
pub(super) fn readable(attributes: &[Attribute]) -> Attributes {
    let named = |attribute: &Attribute| {
        Some(match attribute {
            Attribute::Class(class) => ("CLASS", Value::Text(class.to_string())),
            Attribute::KeyType(key_type) => ("KEY_TYPE", Value::Text(key_type.to_string())),
            Attribute::ValueLen(length) => ("VALUE_LEN", Value::Text(length.to_string())),
            Attribute::Label(label) => ("LABEL", Value::Text(String::from_utf8_lossy(label).into_owned())),
            Attribute::Id(id) => ("ID", Value::Text(base16ct::lower::encode_string(id))),
            Attribute::Token(flag) => ("TOKEN", Value::Flag(*flag)),
            Attribute::Private(flag) => ("PRIVATE", Value::Flag(*flag)),
            Attribute::Sensitive(flag) => ("SENSITIVE", Value::Flag(*flag)),
            Attribute::AlwaysSensitive(flag) => ("ALWAYS_SENSITIVE", Value::Flag(*flag)),
            Attribute::Extractable(flag) => ("EXTRACTABLE", Value::Flag(*flag)),
            Attribute::NeverExtractable(flag) => ("NEVER_EXTRACTABLE", Value::Flag(*flag)),
            Attribute::Local(flag) => ("LOCAL", Value::Flag(*flag)),
            Attribute::Modifiable(flag) => ("MODIFIABLE", Value::Flag(*flag)),
            Attribute::Copyable(flag) => ("COPYABLE", Value::Flag(*flag)),
            Attribute::Wrap(flag) => ("WRAP", Value::Flag(*flag)),
            Attribute::Unwrap(flag) => ("UNWRAP", Value::Flag(*flag)),
            Attribute::Encrypt(flag) => ("ENCRYPT", Value::Flag(*flag)),
            Attribute::Decrypt(flag) => ("DECRYPT", Value::Flag(*flag)),
            Attribute::Sign(flag) => ("SIGN", Value::Flag(*flag)),
            Attribute::Verify(flag) => ("VERIFY", Value::Flag(*flag)),
            Attribute::Derive(flag) => ("DERIVE", Value::Flag(*flag)),
            Attribute::AllowedMechanisms(mechanisms) => {
                ("ALLOWED_MECHANISMS", Value::Names(mechanisms.iter().map(MechanismType::to_string).collect()))
            }
            _ => return None,
        })
    };
    attributes.iter().filter_map(named).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn every_line_of_the_template_is_shown() {
        let profile: Profile = toml::from_str(include_str!("../../../hsm-profiles/kryoptic.toml")).unwrap();
        for mode in [Mode::Wrapkey, Mode::Encrypt, Mode::Gcm] {
            let (id, label) = (vec![7; 16], "trousseau-test".to_owned());
            let template =
                template(&profile, &KekSpec { identity: Identity::of_pkcs11(&id), id, label, mode, pair: None });
            let shown = readable(&template);
            assert_eq!(shown.len(), template.len());
            let value = |name: &str| shown.iter().find(|(shown, _)| *shown == name).unwrap().1.to_string();
            assert_eq!((value("KEY_TYPE"), value("LABEL")), ("CKK_AES".into(), "trousseau-test".into()));
            assert_eq!((value("EXTRACTABLE"), value("WRAP")), ("false".into(), mode.wraps_objects().to_string()));
            assert!(value("ALLOWED_MECHANISMS").starts_with("CKM_AES_"), "{shown:?}");
        }
    }

    #[test]
    fn what_decides_about_a_key_is_shown_and_what_it_is_called_is_not() {
        let said = Said(vec![Attribute::Id(vec![1]), Attribute::Local(true), Attribute::AllowedMechanisms(vec![])]);
        assert_eq!(said.attributes(), [("LOCAL", Value::Flag(true)), ("ALLOWED_MECHANISMS", Value::Names(vec![]))]);
    }
}
