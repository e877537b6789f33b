//! Locks that outlive a panic.
//!
//! A panic is a bug; `catch_unwind` keeps it to one connection, and the lock that it poisons serves on. That
//! is safe under one rule: what a lock guards is whole wherever a panic is possible while it is held.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// Locks a mutex, poisoned or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    whole(mutex.lock())
}

/// What another kind of lock, or a wait with one, returns, poisoned or not.
pub(crate) fn whole<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}
