//! Sockets, threads and memory. Packets are only bytes here: what they mean is for
//! [`protocol`](crate::protocol) and the roles.

pub(crate) mod affinity;
pub(crate) mod background;
pub(crate) mod budget;
pub(crate) mod connect;
pub mod connection;
pub mod endpoint;
pub mod listener;
pub(crate) mod lock;
pub mod os_error;
pub(crate) mod workers;
