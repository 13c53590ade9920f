//! Makes a token for development: what a vendor's tools do for a real HSM.

use std::path::Path;

use cryptoki::session::UserType;
use secrecy::SecretString;

use super::error::{CallError, Class};
use super::module::Module;

/// Initializes the first slot without an initialized token: its label, the security officer's PIN and the user's.
///
/// # Errors
/// What the module answered, for people. A token that has the label already is not touched.
pub fn initialize_token(module: &Path, label: &str, so_pin: &SecretString, pin: &SecretString) -> Result<(), String> {
    let in_use = Module::acquire(module, true)?;
    let library = in_use.library();
    let made = || -> Result<(), CallError> {
        let slots = library.get_slots_with_token()?;
        let mut free = None;
        for slot in slots {
            let info = in_use.token_info(slot)?;
            if !info.token_initialized() {
                free = free.or(Some(slot));
            } else if info.label() == label {
                return Ok(());
            }
        }
        let slot = free.ok_or_else(|| CallError::new(Class::Refused, "there is no free slot"))?;
        library.init_token(slot, so_pin, label)?;
        let session = library.open_rw_session(slot)?;
        session.login(UserType::So, Some(so_pin))?;
        Ok(session.init_pin(pin)?)
    };
    made().map_err(|error| format!("token {label} cannot be made: {error}"))
}
