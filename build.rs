//! Compiles `proto/` into the KMS v2 and v1beta1 service traits (no protoc is needed), lists `hsm-profiles/`, and
//! names the build.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/v2.proto", "proto/v1beta1.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // These messages carry plaintext: without Debug nobody can log one by accident.
        .skip_debug(["."])
        .codec_path("crate::service::codec::SmallMessages")
        .compile_fds(files)?;
    name_the_build();
    list_profiles()
}

/// An array of names and texts. What lies in the directory is in the binary: no list can forget a file.
fn list_profiles() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=hsm-profiles");
    let directory = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("hsm-profiles");
    let mut files: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let entry = |file: &PathBuf| format!("({:?}, include_str!({:?})),\n", file.file_stem().unwrap_or_default(), file);
    let list: String = files.iter().map(entry).collect();
    fs::write(Path::new(&env::var("OUT_DIR")?).join("profiles.rs"), format!("&[\n{list}]\n"))?;
    Ok(())
}

/// What `--version` says after the number: a release build's commit, with `-dirty` if what was built differs from it.
/// `TROUSSEAU_COMMIT` tells it where the sources lie in no repository, else git does.
/// A debug build is nobody's release, and would be built anew at each commit.
fn name_the_build() {
    let commit = || {
        // The repository of these sources, not one that they happen to lie in; whoever it belongs to.
        let git = |arguments: &[&str]| {
            let asked = Command::new("git").args(["-c", "safe.directory=*"]).args(arguments).output().ok()?;
            let said = String::from_utf8(asked.stdout).ok()?.trim().to_owned();
            asked.status.success().then_some(said)
        };
        let here = env::current_dir().and_then(fs::canonicalize).ok()?;
        (Path::new(&git(&["rev-parse", "--show-toplevel"])?) == here).then_some(())?;
        for watched in
            ["src", "hsm-profiles", "Cargo.toml", "Cargo.lock", &git(&["rev-parse", "--git-path", "logs/HEAD"])?]
        {
            println!("cargo:rerun-if-changed={watched}");
        }
        git(&["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"])
    };
    println!("cargo:rerun-if-env-changed=TROUSSEAU_COMMIT");
    let told = env::var("TROUSSEAU_COMMIT").ok().filter(|told| !told.is_empty());
    let build = match env::var("PROFILE").as_deref() {
        Ok("release") => told.or_else(commit).unwrap_or_else(|| "from sources without git".to_owned()),
        _ => "debug build".to_owned(),
    };
    println!("cargo:rustc-env=TROUSSEAU_BUILD={build}");
}
