//! Compiles `proto/` into the KMS v2 and v1beta1 service traits (no protoc is needed), and lists `hsm-profiles/`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/v2.proto", "proto/v1beta1.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // These messages carry plaintext: without Debug nobody can log one by accident.
        .skip_debug(["."])
        .codec_path("crate::service::codec::SmallMessages")
        .compile_fds(files)?;
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
