//! This host's clock, by which KEKs become active.

use std::process::Command;

/// What the kernel says of its clock, whoever keeps it (adjtimex(2)); without systemd to ask, nobody vouches for it.
pub(super) fn is_unsynchronized() -> bool {
    let asked = Command::new("timedatectl").args(["show", "--property=NTPSynchronized", "--value"]).output();
    !asked.is_ok_and(|answer| answer.stdout.trim_ascii() == b"yes")
}
