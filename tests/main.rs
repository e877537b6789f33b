//! The tests through the real programs, by behaviour. All are one test program: it builds in a third of the
//! time of one per file, and while some tests wait, others run.

mod addresses;
mod admission;
mod browser;
mod checker;
mod client;
mod cluster;
mod command;
mod command_line;
mod connections;
mod delivery;
mod deploy;
mod hostile_input;
mod hung_servers;
mod leases;
mod misbehaving_servers;
mod mixtures;
mod packet_files;
mod places;
mod properties;
mod replies;
mod resilience;
mod server_refusals;
mod sharing;
mod stand_still;
mod status;
mod stopping;
mod support;
mod terminal;
mod unread_replies;
mod worker;

#[path = "support/invariants.rs"]
mod invariants;
#[path = "../examples/chaos/kinds/mod.rs"]
mod kinds;
