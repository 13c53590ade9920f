#!/usr/bin/env python3
"""What a binary is made of, from the list of crates that cargo-auditable has put into it: a bill of materials in
CycloneDX's format, and the licences of these crates with all their notices.

usage: cargo metadata … | bill.py BINARY COMMIT SBOM LICENCES
"""
import datetime, hashlib, json, os, pathlib, re, subprocess, sys, tempfile, uuid, zlib

# Names under which crates keep what has to be passed on with them.
NOTICE = re.compile(r"(un)?licen[cs]e|copying|copyright|notice", re.IGNORECASE)


def crates_of(binary):
    """The crates that are linked; those that only built others are left out."""
    with tempfile.TemporaryDirectory() as directory:
        section = pathlib.Path(directory, "section")
        # Reads binaries of other architectures as well.
        subprocess.run(["objcopy", "--dump-section", f".dep-v0={section}", binary, "/dev/null"], check=True)
        listed = json.loads(zlib.decompress(section.read_bytes()))["packages"]
    names = [f"{crate['name']}@{crate['version']}" for crate in listed]
    linked = {}
    for name, crate in zip(names, listed):
        if crate.get("kind", "runtime") == "runtime":
            linked[name] = sorted(names[n] for n in crate.get("dependencies", []))
    return {name: [on for on in dependencies if on in linked] for name, dependencies in linked.items()}


def bill(crates, known, commit, digest):
    """CycloneDX 1.5. The serial number hangs on the binary alone, so that the same one has the same bill."""
    made = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)

    def component(name):
        crate = known[name]
        described = {
            "type": "library",
            "bom-ref": name,
            "name": crate["name"],
            "version": crate["version"],
            "licenses": [{"expression": expression(crate)}],
        }
        if crate["source"]:
            described["purl"] = f"pkg:cargo/{crate['name']}@{crate['version']}"
        if crate["repository"]:
            described["externalReferences"] = [{"type": "vcs", "url": crate["repository"]}]
        return described

    root = next(name for name in crates if not known[name]["source"])
    program = component(root) | {
        "type": "application",
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "properties": [{"name": "commit", "value": commit}],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {"timestamp": made.strftime("%Y-%m-%dT%H:%M:%SZ"), "component": program},
        "components": [component(name) for name in sorted(crates) if name != root],
        "dependencies": [{"ref": name, "dependsOn": on} for name, on in sorted(crates.items())],
    }


def expression(crate):
    if not crate["license"]:
        sys.exit(f"error: {crate['name']} does not say in one expression under which licence it is")
    return crate["license"].replace("/", " OR ")  # as crates wrote it once


def licences(crates, known):
    """Each text once, with the crates that carry it."""
    carriers, texts, lines = {}, {}, []
    for name in sorted(crates):
        crate = known[name]
        if not crate["source"]:
            continue
        lines.append(f"{crate['name']} {crate['version']}: {expression(crate)}")
        for file in sorted(pathlib.Path(crate["manifest_path"]).parent.iterdir()):
            if file.is_file() and NOTICE.match(file.name):
                text = file.read_text(encoding="utf-8", errors="replace").strip()
                key = " ".join(text.split())
                texts.setdefault(key, text)
                carriers.setdefault(key, []).append(f"{crate['name']} {crate['version']}")
    head = "Trousseau is linked with these Rust crates, and with Rust's standard library (MIT OR Apache-2.0):"
    parts = [head, "\n".join(lines)]
    for key, text in texts.items():
        parts.append("-" * 80 + "\n" + ", ".join(dict.fromkeys(carriers[key])) + "\n\n" + text)
    return "\n\n".join(parts) + "\n"


def main():
    binary, commit, sbom, texts = sys.argv[1:]
    crates = crates_of(binary)
    known = {f"{crate['name']}@{crate['version']}": crate for crate in json.load(sys.stdin)["packages"]}
    digest = hashlib.sha256(pathlib.Path(binary).read_bytes()).hexdigest()
    pathlib.Path(sbom).write_text(json.dumps(bill(crates, known, commit, digest), indent=1) + "\n")
    pathlib.Path(texts).write_text(licences(crates, known))


main()
