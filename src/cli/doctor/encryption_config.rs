//! What an EncryptionConfiguration says of this plugin. Pure: from its text to findings.

use std::time::Duration;

use jiff::SignedDuration;
use yaml_rust2::parser::Parser;
use yaml_rust2::{Event, Yaml, YamlLoader};

use super::Findings;
use crate::config::Listen;

const AREA: &str = "API server";

/// No EncryptionConfiguration nests deeper, and the loader calls itself for each level.
const DEPTH: usize = 16;

/// The API server's own patience where none is written.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);

pub(super) fn examine(file: &str, text: &str, listen: &Listen, findings: &mut Findings) {
    if is_too_deep(text) {
        let what = format!("{file} nests deeper than {DEPTH}: it is no EncryptionConfiguration");
        return findings.failure(AREA, what, "name the right file");
    }
    let documents = match YamlLoader::load_from_str(text) {
        Ok(documents) => documents,
        Err(error) => {
            return findings.failure(
                AREA,
                format!("{file} is not YAML: {error}"),
                "correct it: the API server reads it too",
            );
        }
    };
    let [document] = documents.as_slice() else {
        return findings.failure(
            AREA,
            format!("{file} is not one YAML document"),
            "keep one EncryptionConfiguration in it",
        );
    };
    if document["kind"].as_str() != Some("EncryptionConfiguration") {
        return findings.failure(AREA, format!("{file} is no EncryptionConfiguration"), "name the right file");
    }
    let endpoint = format!("unix://{}", listen.socket.display());
    let groups: Vec<Group> = list(&document["resources"]).iter().map(|group| Group::read(group, &endpoint)).collect();
    if groups.iter().all(|group| group.ours.is_none()) {
        let what = format!("{file} has no kms provider with the endpoint {endpoint}");
        let remedy =
            "`trousseau encryption-config` prints one; a socket that is mounted under another name is not known here";
        return findings.failure(AREA, what, remedy);
    }
    // The API server takes the first element that has a resource.
    match groups.iter().find(|group| group.holds_secrets()) {
        Some(group) if group.ours.is_some() => (),
        Some(group) if group.kinds.first() == Some(&"identity") => findings.failure(
            AREA,
            format!(
                "{file}: the first element of `resources` with Secrets has `identity` first: they are not encrypted"
            ),
            "put this plugin's provider there first, or take `secrets` out of that element",
        ),
        _ => {
            let what = format!("{file} has Secrets encrypted by another provider than this plugin, or by none");
            findings.warning(AREA, what, "add `secrets` to the resources of this plugin's provider");
        }
    }
    for group in groups {
        group.report(file, listen, findings);
    }
}

fn is_too_deep(text: &str) -> bool {
    let (mut parser, mut depth) = (Parser::new_from_str(text), 0_usize);
    while let Ok((event, _)) = parser.next_token() {
        depth = match event {
            Event::SequenceStart(..) | Event::MappingStart(..) if depth == DEPTH => return true,
            Event::SequenceStart(..) | Event::MappingStart(..) => depth + 1,
            Event::SequenceEnd | Event::MappingEnd => depth.saturating_sub(1),
            Event::StreamEnd => return false,
            _ => depth,
        };
    }
    false // it is not YAML, as the loader will say
}

/// One element of `resources`.
struct Group<'y> {
    resources: Vec<&'y str>,
    /// What each provider is, in order.
    kinds: Vec<&'y str>,
    /// Where our provider stands among them, and what it says.
    ours: Option<(usize, &'y Yaml)>,
}

impl<'y> Group<'y> {
    fn read(group: &'y Yaml, endpoint: &str) -> Self {
        let providers = list(&group["providers"]);
        let kind = |provider: &'y Yaml| provider.as_hash()?.keys().next()?.as_str();
        let is_ours = |provider: &&'y Yaml| provider["kms"]["endpoint"].as_str() == Some(endpoint);
        Self {
            resources: list(&group["resources"]).iter().filter_map(Yaml::as_str).collect(),
            kinds: providers.iter().map(|provider| kind(provider).unwrap_or("?")).collect(),
            ours: providers.iter().enumerate().find(|(_, provider)| is_ours(provider)).map(|(n, p)| (n, &p["kms"])),
        }
    }

    fn holds_secrets(&self) -> bool {
        ["secrets", "*.", "*.*"].iter().any(|name| self.resources.contains(name))
    }

    fn report(&self, file: &str, listen: &Listen, findings: &mut Findings) {
        let Some((place, kms)) = self.ours else { return };
        let resources = self.resources.join(", ");
        let name = kms["name"].as_str().unwrap_or("?");
        let of = format!("{file}, provider {name} of {resources}");
        let before = findings.0.len();
        report_version(&of, kms, listen, findings);
        match timeout(kms) {
            Some(timeout) if timeout < DEFAULT_TIMEOUT => findings.warning(
                AREA,
                format!("{of}: a call may take {timeout:?}: a token that fails over or is found again takes longer"),
                "write `timeout: 3s`",
            ),
            Some(_) => (),
            None => findings.failure(AREA, format!("{of}: its timeout is no duration"), "write `timeout: 3s`"),
        }
        match self.kinds.first() {
            _ if place == 0 => (),
            Some(&"identity") => findings.failure(
                AREA,
                format!("{of}: `identity` comes first: what is written is not encrypted"),
                "put the kms provider first, unless you are moving away from encryption",
            ),
            first => findings.warning(
                AREA,
                format!("{of}: `{}` comes first, and encrypts what is written", first.unwrap_or(&"?")),
                "put this plugin's provider first once every API server has the file",
            ),
        }
        if place == 0 && self.kinds.contains(&"identity") {
            findings.warning(
                AREA,
                format!("{of}: `identity` is left in: whoever can write to etcd can plant plaintext objects"),
                "rewrite what is stored, and then remove it",
            );
        }
        if findings.0.len() == before {
            findings.good(AREA, format!("{of}: it is right; never rename it"));
        }
    }
}

/// KMS v2 is what is wanted; v1 is the default of the file.
fn report_version(of: &str, kms: &Yaml, listen: &Listen, findings: &mut Findings) {
    match kms["apiVersion"].as_str().unwrap_or("v1") {
        "v2" if !kms["cachesize"].is_badvalue() => findings.failure(
            AREA,
            format!("{of}: cachesize belongs to v1: the API server does not start with it under v2"),
            "remove it",
        ),
        "v2" => (),
        "v1" if listen.v1beta1 => findings.warning(
            AREA,
            format!("{of}: it speaks KMS v1, which is deprecated and asks the token for every write"),
            "add a provider with `apiVersion: v2` before it, under another name",
        ),
        "v1" => findings.failure(
            AREA,
            format!("{of}: it speaks KMS v1, which the plugin does not serve"),
            "write `apiVersion: v2`, or set listen.v1beta1 if v1 has written data",
        ),
        other => findings.failure(AREA, format!("{of}: apiVersion {other} does not exist"), "write `apiVersion: v2`"),
    }
}

fn timeout(kms: &Yaml) -> Option<Duration> {
    match &kms["timeout"] {
        Yaml::BadValue => Some(DEFAULT_TIMEOUT),
        written => Duration::try_from(written.as_str()?.parse::<SignedDuration>().ok()?).ok(),
    }
}

fn list(yaml: &Yaml) -> &[Yaml] {
    yaml.as_vec().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::Severity;
    use super::*;

    fn listen(v1beta1: bool) -> Listen {
        let allow_uids = BTreeSet::from([0]);
        Listen { socket: "/run/trousseau/kms.sock".into(), mode: 0o600, group: None, allow_uids, v1beta1 }
    }

    type Expected = &'static [(Severity, &'static str)];

    const GOOD: &str = "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n  - resources:\n      - secrets\n    providers:\n      - kms:\n          apiVersion: v2\n          name: trousseau\n          endpoint: unix:///run/trousseau/kms.sock\n          timeout: 3s\n";

    #[test]
    fn each_mistake_is_found_and_nothing_else() {
        let identity = "      - identity: {}\n";
        let element =
            |resource: &str, provider: &str| format!("  - resources: ['{resource}']\n    providers: [{provider}]\n");
        let ours = element("*.*", "{kms: {apiVersion: v2, name: k, endpoint: 'unix:///run/trousseau/kms.sock'}}");
        let [exempt, other] =
            ["identity: {}", "aescbc: {keys: []}"].map(|kind| element("secrets", &format!("{{{kind}}}")));
        let several = |elements: [&str; 2]| format!("kind: EncryptionConfiguration\nresources:\n{}", elements.concat());
        let cases: [(&str, String, Expected); 21] = [
            ("good", GOOD.into(), &[(Severity::Good, "it is right")]),
            ("without end", "- ".repeat(50_000), &[(Severity::Failure, "nests deeper than 16")]),
            ("no timeout", GOOD.replace("          timeout: 3s\n", ""), &[(Severity::Good, "it is right")]),
            ("as JSON", r#"{"kind":"EncryptionConfiguration","resources":[{"resources":["*.*"],"providers":[{"kms":{"apiVersion":"v2","name":"k","endpoint":"unix:///run/trousseau/kms.sock"}}]}]}"#.into(), &[(Severity::Good, "provider k of *.*")]),
            ("identity last", format!("{GOOD}{identity}"), &[(Severity::Warning, "`identity` is left in")]),
            (
                "identity first",
                GOOD.replace("    providers:\n", &format!("    providers:\n{identity}")),
                &[(Severity::Failure, "`identity` comes first")],
            ),
            (
                "another first",
                GOOD.replace("    providers:\n", "    providers:\n      - aescbc: {keys: []}\n"),
                &[(Severity::Warning, "`aescbc` comes first")],
            ),
            ("a short timeout", GOOD.replace("3s", "500ms"), &[(Severity::Warning, "may take 500ms")]),
            ("a bad timeout", GOOD.replace("3s", "soon"), &[(Severity::Failure, "no duration")]),
            ("another endpoint", GOOD.replace("kms.sock", "other.sock"), &[(Severity::Failure, "no kms provider with")]),
            ("v1", GOOD.replace("          apiVersion: v2\n", ""), &[(Severity::Failure, "does not serve")]),
            ("v3", GOOD.replace("apiVersion: v2", "apiVersion: v3"), &[(Severity::Failure, "v3 does not exist")]),
            ("cachesize", format!("{GOOD}          cachesize: 10\n"), &[(Severity::Failure, "cachesize")]),
            ("no secrets", GOOD.replace("- secrets", "- configmaps"), &[
                (Severity::Warning, "Secrets encrypted by another"),
                (Severity::Good, "of configmaps"),
            ]),
            ("secrets taken out before", several([&exempt, &ours]), &[
                (Severity::Failure, "they are not encrypted"),
                (Severity::Good, "of *.*"),
            ]),
            ("secrets of another's before", several([&other, &ours]), &[
                (Severity::Warning, "Secrets encrypted by another"),
                (Severity::Good, "of *.*"),
            ]),
            ("the same after it", several([&ours, &exempt]), &[(Severity::Good, "of *.*")]),
            ("another kind", GOOD.replace("EncryptionConfiguration", "Pod"), &[(Severity::Failure, "no EncryptionConf")]),
            ("no YAML", "kind: [".into(), &[(Severity::Failure, "is not YAML")]),
            ("empty", String::new(), &[(Severity::Failure, "not one YAML document")]),
            ("two", format!("{GOOD}---\n{GOOD}"), &[(Severity::Failure, "not one YAML document")]),
        ];
        for (case, text, expected) in cases {
            let mut findings = Findings::default();
            examine("file", &text, &listen(false), &mut findings);
            let found: Vec<_> = findings.0.iter().map(|finding| (finding.severity, finding.what.as_str())).collect();
            assert_eq!(found.len(), expected.len(), "{case}: {found:?}");
            for ((severity, what), (wanted, words)) in found.iter().zip(expected) {
                assert!(severity == wanted && what.contains(words), "{case}: {found:?}");
            }
        }
        let mut findings = Findings::default();
        examine("file", &GOOD.replace("          apiVersion: v2\n", ""), &listen(true), &mut findings);
        assert_eq!(findings.0.iter().map(|finding| finding.severity).collect::<Vec<_>>(), [Severity::Warning]);
    }

    #[test]
    fn what_the_plugin_prints_itself_is_right_but_for_identity() {
        let printed = include_str!("../encryption-config/common.yaml")
            .replace("@SOCKET@", "/run/trousseau/kms.sock")
            .replace("@NAME@", "trousseau")
            .replace("@RESOURCES@", "      - secrets");
        let mut findings = Findings::default();
        examine("file", &printed, &listen(false), &mut findings);
        let whats: Vec<_> = findings.0.iter().map(|finding| finding.what.as_str()).collect();
        assert!(matches!(whats.as_slice(), [only] if only.contains("`identity` is left in")), "{whats:?}");
    }
}
