//! The port of this machine at which a training's ranks meet, kept from everybody else until the first of them listens there.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpSocket;

/// A port that nobody gets by chance while this lives; the first rank asks for exactly this one.
#[derive(Debug)]
pub struct HeldPort {
    number: u16,
    _socket: TcpSocket,
}

impl HeldPort {
    /// Reserves a free one of the loopback address.
    ///
    /// # Errors
    /// None is free.
    pub fn take() -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        // If both sockets have this option, one may listen at the address of another that does not.
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        Ok(Self {
            number: socket.local_addr()?.port(),
            _socket: socket,
        })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_held_port_is_free_for_a_rank_and_for_nobody_else() {
        let held = HeldPort::take().unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, held.number()));
        let other = TcpSocket::new_v4().unwrap();
        let refused = other.bind(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        // Ranks listen like this, with the option that the standard library sets too.
        TcpListener::bind(address).unwrap();
    }
}
