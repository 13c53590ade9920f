//! Properties; what becomes of which file is written down in `tests/cmd/migrate.trycmd`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use proptest::prelude::*;
use serde_json::json;
use toml::Table;

use super::*;

proptest! {
    #[test]
    fn whatever_the_texts_are_they_are_carried_over_as_they_are(
        address in "https://\\PC{1,20}",
        key in "\\PC{1,20}",
        token in "\\PC{1,20}",
        ca in "/\\PC{0,20}",
        nested: bool,
    ) {
        // JSON is YAML too. A template is refused, and a list of version 1 may be one text.
        prop_assume!(![&address, &key, &token, &ca].iter().any(|text| text.contains("{{")));
        let old = json!({"keyNames": [key], "address": address, "token": token, "vaultCACert": ca});
        let old = if nested { json!({"provider": "vault", "vault": old}) } else { old };
        let conversion = convert(&old.to_string(), Some("test")).map_err(|refused| refused.what).unwrap();
        prop_assert_eq!(conversion.generation, if nested { 1 } else { 2 });
        let new: Table = conversion.toml.parse().unwrap();
        let provider = &new["provider"][0];
        let said = ["address", "key", "ca-file"].map(|key| provider[key].as_str().unwrap());
        prop_assert_eq!(said, [&address, &key, &ca].map(String::as_str));
        prop_assert_eq!(conversion.secrets, vec![("vault-token", Zeroizing::new(token))]);
    }

    #[test]
    fn no_text_makes_it_panic(text in "(keyNames: \\[a\\]\naddress: b\n|vault:\n  token: )?[a-zA-Z:\\[\\]{}&*!|>'\"%@~ \n\t-]{0,64}") {
        if let Err(refused) = convert(&text, None) {
            prop_assert!(!refused.what.is_empty() && !refused.remedy.is_empty());
        }
    }
}
