//! A throw-away certificate authority, kept by the program openssl.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Elliptic keys, since RSA's take long to make.
const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

const CONFIGURATION: &str = "
[ca]
default_ca = tests
[tests]
database = index
serial = serial
new_certs_dir = .
unique_subject = no
default_md = sha256
copy_extensions = copy
policy = names
[names]
commonName = supplied
";

/// It lives in a directory of its own.
pub struct Authority {
    directory: PathBuf,
}

/// A certificate and its key, in PEM files.
pub struct Certificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new(directory: PathBuf) -> Self {
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("conf"), CONFIGURATION).unwrap();
        fs::write(directory.join("index"), "").unwrap();
        let authority = Self { directory };
        let name = authority.directory.file_name().unwrap().to_str().unwrap();
        let own = ["-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", &format!("/CN={name} of tests")];
        authority.openssl(&[&["req", "-x509"], &KEY[..], &own].concat());
        authority
    }

    /// What those trust who trust it.
    pub fn file(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// For a server on 127.0.0.1, or for a client, good for ten years.
    pub fn issue(&self, name: &str) -> Certificate {
        self.issue_until(name, "20360101000000Z")
    }

    pub fn issue_until(&self, name: &str, end: &str) -> Certificate {
        let files = [".pem", ".key", ".csr"].map(|ending| format!("{name}{ending}"));
        let [certificate, key, request] = files.each_ref().map(String::as_str);
        let subject = format!("/CN={name}");
        let asked = ["-keyout", key, "-out", request, "-subj", &subject, "-addext", "subjectAltName=IP:127.0.0.1"];
        self.openssl(&[&["req", "-new"], &KEY[..], &asked].concat());
        let dates = ["-startdate", "20200101000000Z", "-enddate", end];
        let signs = ["-keyfile", "ca.key", "-cert", "ca.pem", "-in", request, "-out", certificate, "-notext"];
        self.openssl(&[&["ca", "-batch", "-rand_serial", "-config", "conf"], &dates[..], &signs].concat());
        Certificate { certificate: self.directory.join(certificate), key: self.directory.join(key) }
    }

    fn openssl(&self, arguments: &[&str]) {
        openssl(&self.directory, arguments);
    }
}

/// Runs openssl in a directory, and returns what it printed.
pub fn openssl(directory: &Path, arguments: &[&str]) -> Vec<u8> {
    let done = Command::new("openssl").args(arguments).current_dir(directory).output().expect("openssl");
    assert!(done.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}
