//! Compiles `proto/` into the KMS v2 and v1beta1 service traits. No protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/v2.proto", "proto/v1beta1.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // These messages carry plaintext: without Debug nobody can log one by accident.
        .skip_debug(["."])
        .codec_path("crate::service::codec::SmallMessages")
        .compile_fds(files)?;
    Ok(())
}
