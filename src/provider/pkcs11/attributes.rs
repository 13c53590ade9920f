//! What a token says of a key, and what is asked of it when one is made, as people read it: by the names of PKCS#11.

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass};

use super::admission::{KekSpec, Said};
use super::{oaep, raw};
use crate::config::{Mode, Omissible, Profile};
use crate::provider::{Attributes, Value};

/// What is asked of the token when a KEK is made, for each of its objects.
pub(super) fn templates(profile: &Profile, kek: &KekSpec) -> Vec<(&'static str, Vec<Attribute>)> {
    if kek.mode != Mode::Oaep {
        return vec![("secret key", template(profile, kek))];
    }
    let [encrypts, decrypts] = oaep::templates(profile, kek, true);
    let [verifies, signs] = oaep::templates(profile, kek, false);
    vec![
        ("public key that encrypts", encrypts),
        ("private key that decrypts", decrypts),
        ("public key that verifies", verifies),
        ("private key that signs", signs),
    ]
}

/// What is asked for a KEK of one object: 256-bit AES that never leaves the token, and whose attributes nobody changes.
pub(super) fn template(profile: &Profile, kek: &KekSpec) -> Vec<Attribute> {
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
    let omitted: Vec<_> = profile.omit_attributes.iter().copied().map(omitted).collect();
    template.retain(|attribute| !omitted.contains(&attribute.attribute_type()));
}

/// The attribute that is left out of the template for a KEK.
pub(super) const fn omitted(omissible: Omissible) -> AttributeType {
    match omissible {
        Omissible::CkaPrivate => AttributeType::Private,
        Omissible::CkaSensitive => AttributeType::Sensitive,
        Omissible::CkaModifiable => AttributeType::Modifiable,
        Omissible::CkaCopyable => AttributeType::Copyable,
        Omissible::CkaEncrypt => AttributeType::Encrypt,
        Omissible::CkaDecrypt => AttributeType::Decrypt,
        Omissible::CkaWrap => AttributeType::Wrap,
        Omissible::CkaUnwrap => AttributeType::Unwrap,
        Omissible::CkaSign => AttributeType::Sign,
        Omissible::CkaVerify => AttributeType::Verify,
        Omissible::CkaDerive => AttributeType::Derive,
        Omissible::CkaAllowedMechanisms => AttributeType::AllowedMechanisms,
    }
}

impl Said {
    /// The attributes that decide what can be done with a key.
    pub(super) fn attributes(&self) -> Attributes {
        let is_shown = |name: &str| !["CLASS", "KEY_TYPE", "VALUE_LEN", "ID", "PUBLIC_EXPONENT"].contains(&name);
        readable(&self.0).into_iter().filter(|(name, _)| is_shown(name)).collect()
    }
}

/// Attributes by their names without CKA_, in the same order; those that have no name here are left out.
pub(super) fn readable(attributes: &[Attribute]) -> Attributes {
    let named = |attribute: &Attribute| Some((name(attribute.attribute_type())?, value(attribute)?));
    attributes.iter().filter_map(named).collect()
}

/// What an auditor asks of a key, besides its CKA_ID and CKA_ALLOWED_MECHANISMS.
pub(super) const EXAMINED: [AttributeType; 19] = [
    AttributeType::Label,
    AttributeType::KeyType,
    AttributeType::ValueLen,
    AttributeType::Token,
    AttributeType::Private,
    AttributeType::Sensitive,
    AttributeType::AlwaysSensitive,
    AttributeType::Extractable,
    AttributeType::NeverExtractable,
    AttributeType::Local,
    AttributeType::Modifiable,
    AttributeType::Copyable,
    AttributeType::Encrypt,
    AttributeType::Decrypt,
    AttributeType::Wrap,
    AttributeType::Unwrap,
    AttributeType::Sign,
    AttributeType::Verify,
    AttributeType::Derive,
];

/// The name of an attribute, without CKA_.
pub(super) const fn name(attribute: AttributeType) -> Option<&'static str> {
    Some(match attribute {
        AttributeType::Class => "CLASS",
        AttributeType::KeyType => "KEY_TYPE",
        AttributeType::ValueLen => "VALUE_LEN",
        AttributeType::ModulusBits => "MODULUS_BITS",
        AttributeType::PublicExponent => "PUBLIC_EXPONENT",
        AttributeType::Label => "LABEL",
        AttributeType::Id => "ID",
        AttributeType::Token => "TOKEN",
        AttributeType::Private => "PRIVATE",
        AttributeType::Sensitive => "SENSITIVE",
        AttributeType::AlwaysSensitive => "ALWAYS_SENSITIVE",
        AttributeType::Extractable => "EXTRACTABLE",
        AttributeType::NeverExtractable => "NEVER_EXTRACTABLE",
        AttributeType::Local => "LOCAL",
        AttributeType::Modifiable => "MODIFIABLE",
        AttributeType::Copyable => "COPYABLE",
        AttributeType::Wrap => "WRAP",
        AttributeType::Unwrap => "UNWRAP",
        AttributeType::Encrypt => "ENCRYPT",
        AttributeType::Decrypt => "DECRYPT",
        AttributeType::Sign => "SIGN",
        AttributeType::SignRecover => "SIGN_RECOVER",
        AttributeType::Verify => "VERIFY",
        AttributeType::Derive => "DERIVE",
        AttributeType::AllowedMechanisms => "ALLOWED_MECHANISMS",
        _ => return None,
    })
}

/// The name of a mechanism, with CKM_; cryptoki does not know all.
pub(super) fn mechanism_name(mechanism: MechanismType) -> String {
    match mechanism {
        raw::AES_KWP => "CKM_AES_KEY_WRAP_KWP".into(),
        raw::UNNAMED => "one that cannot be read".into(),
        named => named.to_string(),
    }
}

fn value(attribute: &Attribute) -> Option<Value> {
    Some(match attribute {
        Attribute::Class(class) => Value::Text(class.to_string()),
        Attribute::KeyType(key_type) => Value::Text(key_type.to_string()),
        Attribute::ValueLen(length) | Attribute::ModulusBits(length) => Value::Text(length.to_string()),
        Attribute::Label(label) => Value::Text(String::from_utf8_lossy(label).into_owned()),
        Attribute::Id(bytes) | Attribute::PublicExponent(bytes) => Value::Text(base16ct::lower::encode_string(bytes)),
        Attribute::Token(flag)
        | Attribute::Private(flag)
        | Attribute::Sensitive(flag)
        | Attribute::AlwaysSensitive(flag)
        | Attribute::Extractable(flag)
        | Attribute::NeverExtractable(flag)
        | Attribute::Local(flag)
        | Attribute::Modifiable(flag)
        | Attribute::Copyable(flag)
        | Attribute::Wrap(flag)
        | Attribute::Unwrap(flag)
        | Attribute::Encrypt(flag)
        | Attribute::Decrypt(flag)
        | Attribute::Sign(flag)
        | Attribute::SignRecover(flag)
        | Attribute::Verify(flag)
        | Attribute::Derive(flag) => Value::Flag(*flag),
        Attribute::AllowedMechanisms(mechanisms) => {
            Value::Names(mechanisms.iter().copied().map(mechanism_name).collect())
        }
        _ => return None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn every_line_of_the_template_is_shown() {
        let profile: Profile = toml::from_str(include_str!("../../../hsm-profiles/kryoptic.toml")).unwrap();
        for mode in [Mode::Wrapkey, Mode::Encrypt, Mode::Gcm, Mode::Oaep] {
            let (id, label) = (vec![7; 16], "trousseau-test".to_owned());
            let kek = KekSpec { identity: Identity::of_pkcs11(&id), id, label, mode, pair: None };
            let templates = templates(&profile, &kek);
            assert_eq!(templates.len(), if mode == Mode::Oaep { 4 } else { 1 });
            for (of, template) in templates {
                let shown = readable(&template);
                assert_eq!(shown.len(), template.len(), "{of}");
                let value =
                    |name: &str| shown.iter().find(|(shown, _)| *shown == name).map(|(_, value)| value.to_string());
                assert_eq!(value("LABEL").unwrap(), "trousseau-test", "{of}");
                let is_public = of.starts_with("public");
                assert_eq!(value("EXTRACTABLE"), (!is_public).then(|| "false".into()), "{of}");
                assert_eq!(value("MODULUS_BITS"), is_public.then(|| "3072".into()), "{of}");
                let pinned = if of == "secret key" { "CKM_AES_" } else { "CKM_RSA_PKCS" };
                assert!(is_public || value("ALLOWED_MECHANISMS").unwrap().starts_with(pinned), "{shown:?}");
            }
        }
    }

    #[test]
    fn what_decides_about_a_key_is_shown_and_what_it_is_called_is_not() {
        let said = Said(vec![Attribute::Id(vec![1]), Attribute::Local(true), Attribute::AllowedMechanisms(vec![])]);
        assert_eq!(said.attributes(), [("LOCAL", Value::Flag(true)), ("ALLOWED_MECHANISMS", Value::Names(vec![]))]);
    }
}
