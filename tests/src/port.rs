//! Reserves a port on this machine: without that, a port that was found free may be taken by the time it is used.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A port that only programs get that ask for exactly this one.
#[derive(Debug)]
pub struct HeldPort {
    number: u16,
    _socket: OwnedFd,
}

impl HeldPort {
    /// Reserves one.
    ///
    /// # Panics
    /// None is free.
    pub fn take() -> Self {
        let size = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        let mut address = libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: 0,
            sin_addr: libc::in_addr {
                s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
            },
            sin_zero: [0; 8],
        };
        // SAFETY: the descriptor is new and nobody else's; the calls read and fill structures that live until they return.
        unsafe {
            let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            assert!(socket >= 0, "a socket");
            let socket = OwnedFd::from_raw_fd(socket);
            let (number, yes) = (socket.as_raw_fd(), 1_i32);
            // With this option on both sockets, Linux lets a server use the port of one that does not listen.
            let reuse = libc::setsockopt(
                number,
                libc::SOL_SOCKET,
                libc::SO_REUSEADDR,
                (&raw const yes).cast(),
                size_of::<i32>() as libc::socklen_t,
            );
            let bound = libc::bind(number, (&raw const address).cast(), size);
            let mut filled = size;
            let named = libc::getsockname(number, (&raw mut address).cast(), &raw mut filled);
            assert_eq!([reuse, bound, named], [0; 3], "a port");
            Self {
                number: u16::from_be(address.sin_port),
                _socket: socket,
            }
        }
    }

    /// The port's number.
    pub fn number(&self) -> u16 {
        self.number
    }
}
