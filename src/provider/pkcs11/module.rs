//! A PKCS#11 module: the shared library, loaded once a process, initialized while somebody uses it.
//!
//! `C_Initialize` and `C_Finalize` belong to the library and not to a token: a second C_Initialize without C_Finalize
//! crashes SoftHSM, and C_Finalize ends every session of every token. So whoever uses a library holds an [`InUse`]
//! for as long as it has sessions, and when the last one is gone the library is finalized. Some libraries see a new
//! token only after that. Others do not stand a second C_Initialize in one process: they are never finalized.
//!
//! The library runs inside this process. Measured (November 2026, two busy cores): after a crash in it, or when all its
//! calls hang and the process leaves, the next process serves 0.5 to 0.9 s later behind the inherited socket, 0.5 s of
//! which are systemd's pause, so that a library that crashes each time does not log in ten times a second. Without the pause
//! a process serves 10 ms after its start, and one that only loads SoftHSM and logs in takes 5 to 7 (`--bench start`);
//! with a login of one second it is 1.01 s for both. So a child process for each module would save the pause and 4 ms, and
//! cost each request two process switches; two thread switches cost 50 µs of CPU, twice what SoftHSM's own call does.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::error::CallError;
use super::raw::token_info::TokenInfos;
use super::slots::Slots;
use crate::disk;
use crate::sync::lock;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::slot::{Slot, TokenInfo};

/// Every library that this process has loaded; none is ever unloaded, since some leave threads behind.
static LOADED: Mutex<BTreeMap<PathBuf, Arc<Module>>> = Mutex::new(BTreeMap::new());

/// How long whoever wants the library waits for others to give it up, when it is to be initialized anew.
const RENEWAL_PATIENCE: Duration = Duration::from_secs(1);
/// How often all give it up, at most, because one token wants that.
const RENEWED_FOR_ONE: Duration = Duration::from_secs(60);
/// How long a process that ends may take for it.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);

/// A loaded library.
pub(super) struct Module {
    /// Its file, with no link in the path.
    path: PathBuf,
    library: Pkcs11,
    token_infos: TokenInfos,
    in_use: Mutex<InUseBy>,
    given_up: Condvar,
    slots: Slots,
}

#[derive(Default)]
struct InUseBy {
    users: usize,
    /// Some libraries refuse C_Finalize; then they stay initialized.
    initialized: bool,
    /// The last C_Initialize failed, on whatever way it got.
    half_way: bool,
    /// It is never finalized.
    stays: bool,
    /// Everybody is to give it up, so that it is finalized and initialized anew.
    renewed: bool,
    /// When they last were to, because one token wanted that.
    renewed_for_one: Option<Instant>,
}

/// The right to call an initialized library. Sessions must be closed before it is dropped.
pub(super) struct InUse(Arc<Module>);

impl Module {
    /// The library at `path`, initialized. Unless everybody says `reinitialize`, it stays so until the process ends.
    ///
    /// # Errors
    /// What failed and what to do, for people.
    pub(super) fn acquire(path: &Path, reinitialize: bool) -> Result<InUse, String> {
        let module = Self::load(path)?;
        let awaited = |state: &mut InUseBy| state.renewed && state.users > 0;
        let waiting = module.given_up.wait_timeout_while(lock(&module.in_use), RENEWAL_PATIENCE, awaited);
        let (mut state, _) = waiting.unwrap_or_else(PoisonError::into_inner);
        if !state.initialized {
            module.initialize(&mut state.half_way).map_err(|error| initialize_error(path, error))?;
        }
        let (users, stays) = (state.users + 1, state.stays || !reinitialize);
        let renewed_for_one = state.renewed_for_one;
        *state = InUseBy { users, initialized: true, half_way: false, stays, renewed: false, renewed_for_one };
        drop(state);
        Ok(InUse(module))
    }

    /// C_Initialize. A library whose last one failed `half_way` may take itself for initialized from then on (kryoptic
    /// does, after one while its token was being made); only C_Finalize ends that. In any other case whoever
    /// initialized it, such as p11-kit in this process, needs it so.
    fn initialize(&self, half_way: &mut bool) -> Result<(), Error> {
        let initialize = || self.library.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
        let is_already =
            |done: &Result<(), Error>| matches!(done, Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)));
        let mut done = initialize();
        if *half_way && is_already(&done) {
            done = self.library.clone().finalize().and_then(|()| initialize());
        }
        if !is_already(&done) {
            *half_way = done.is_err();
        }
        done
    }

    /// Whether the library at `path` has had its last user, and must not be initialized again.
    pub(super) fn is_spent(path: &Path) -> bool {
        Self::load(path).is_ok_and(|module| {
            let state = lock(&module.in_use);
            state.users == 0 && state.stays
        })
    }

    fn load(path: &Path) -> Result<Arc<Self>, String> {
        let mut loaded = lock(&LOADED);
        // Two names of one file are one library to the dynamic linker.
        let path = path.canonicalize().map_err(|error| format!("module {}: {error}: install it", path.display()))?;
        if let Some(module) = loaded.get(&path) {
            return Ok(Arc::clone(module));
        }
        refuse_if_changeable_by_others(&path)?;
        let library = Pkcs11::new(&path).map_err(|error| load_error(&path, &error))?;
        let token_infos = TokenInfos::load(&path).map_err(|error| load_error(&path, &error))?;
        let module = Arc::new(Self {
            path: path.clone(),
            library,
            token_infos,
            in_use: Mutex::default(),
            given_up: Condvar::new(),
            slots: Slots::default(),
        });
        loaded.insert(path, Arc::clone(&module));
        Ok(module)
    }
}

impl InUse {
    pub(super) fn library(&self) -> &Pkcs11 {
        &self.0.library
    }

    /// What the token in the slot says of itself.
    pub(super) fn token_info(&self, slot: Slot) -> Result<TokenInfo, CallError> {
        Ok(self.0.token_infos.of(slot)?)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0.path
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.0.slots
    }

    /// From now on everybody is to give the library up for a moment.
    pub(super) fn renew(&self) {
        lock(&self.0.in_use).renewed = true;
    }

    /// The same, since one token is of no use until then. Where another one is, that is worth a moment of it now and then,
    /// and no more. Returns whether it is now; a library that is never finalized is only asked for.
    pub(super) fn renew_for_one(&self) -> bool {
        let mut state = lock(&self.0.in_use);
        let may = state.renewed_for_one.is_none_or(|last| last.elapsed() > RENEWED_FOR_ONE);
        if may {
            state.renewed |= !state.stays;
            state.renewed_for_one = Some(Instant::now());
        }
        may
    }

    /// Whether everybody is to give it up for a moment.
    pub(super) fn is_renewed(&self) -> bool {
        lock(&self.0.in_use).renewed
    }
}

impl Clone for InUse {
    fn clone(&self) -> Self {
        lock(&self.0.in_use).users += 1;
        Self(Arc::clone(&self.0))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut state = lock(&self.0.in_use);
        state.users -= 1;
        self.0.given_up.notify_all();
        if state.users == 0 && !state.stays {
            let finalized = self.0.library.clone().finalize();
            // One that has lost its state by itself says so, and waits for C_Initialize.
            let is_not = matches!(finalized, Err(Error::Pkcs11(RvError::CryptokiNotInitialized, _)));
            state.initialized = finalized.is_err() && !is_not;
            if let (Err(error), false) = (finalized, is_not) {
                tracing::warn!("{}: the module stays initialized", CallError::from(error));
            }
        }
    }
}

/// Ends the process, since nothing less would make the token usable again: the supervisor starts it anew. Exit code 69.
pub fn leave(reason: &dyn fmt::Display) -> ! {
    tracing::error!("the process ends, to be started anew: {reason}");
    // Other threads may be inside the library, where its destructors could wait for them.
    thread::spawn(|| {
        thread::sleep(LEAVE_PATIENCE);
        std::process::abort();
    });
    std::process::exit(69)
}

/// Whoever can change the library runs as us.
fn refuse_if_changeable_by_others(path: &Path) -> Result<(), String> {
    let metadata = path.metadata().map_err(|error| format!("module {}: {error}", path.display()))?;
    disk::refuse_if_changeable_by_others(path, &metadata)
        .map_err(|(what, remedy)| format!("module {} {what}: {remedy}", path.display()))
}

fn load_error(path: &Path, error: &Error) -> String {
    let path = path.display();
    match error {
        Error::LibraryLoading(_) => format!(
            "module {path} cannot be loaded: {error}: check that it is a shared library for this machine, and with \
             `ldd {path}` that what it needs is installed"
        ),
        Error::MissingSymbol(_) | Error::NullFunctionPointer => {
            format!("module {path} is not a PKCS#11 module: {error}: name the vendor's PKCS#11 library")
        }
        _ => format!("module {path} cannot be used: {error}: see the vendor's installation guide"),
    }
}

fn initialize_error(path: &Path, error: Error) -> String {
    format!(
        "module {}: {}: check the vendor's configuration file and environment variables, and \
         that uid {} may read them",
        path.display(),
        CallError::from(error),
        rustix::process::geteuid().as_raw()
    )
}
