//! Sockets, threads and memory. Packets are only bytes here: what they mean is for
//! [`protocol`](crate::protocol) and the roles.

pub(crate) mod affinity;
pub(crate) mod budget;
pub mod connection;
pub mod endpoint;
pub mod listener;
pub mod os_error;
