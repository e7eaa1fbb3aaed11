//! `retort ui`: the history as pages for a browser.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Context, Error, Exit, output};
use crate::ui::{self, Guard, ServerState};

/// The port, unless another is named.
const PORT: u16 = 6116;

/// Arguments of `ui`.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = "Pages: the runs (filtered, ordered, grouped by tag), one run (stages, progress, metrics, \
    parameters, reasons, log, artifacts, environment), curves, pictures (samples of the same noise side by side) and \
    comparisons. A page's address holds its state: links can be saved and shared. Keys: press ? on a page.\n\n\
    Examples:\n  \
    retort ui --open                              the store in .retort, in a browser\n  \
    retort ui --store a/.retort --store b/.retort  two stores\n  \
    ssh -L 6116:localhost:6116 host retort ui     on another machine; then open http://localhost:6116 here"
)]
pub struct Args {
    /// Listen on this port. Without it, 6116, or any free one when that is taken; 0 takes any free one.
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Open the page in a browser.
    #[arg(long)]
    pub open: bool,
    /// Allow tags, notes and runs to be changed; by default pages are read-only.
    ///
    /// The address then has a token, so that nobody else on this machine can change anything.
    #[arg(long)]
    pub write: bool,
    /// Listen on this address: addresses other than loopback are reachable from other machines and need a token.
    ///
    /// The connection is not encrypted: across a network a tunnel (`ssh -L`) is the better way.
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind: IpAddr,
    /// Also accept this host name, besides `localhost` and addresses (may be repeated): behind a proxy, or by the machine's
    /// name.
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
}

/// Serves pages until Ctrl-C.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    // At its end unfinished downloads may be cut off.
    context.runtime()?.block_on(serve(args, context))
}

async fn serve(args: &Args, context: &Context) -> Result<(), Error> {
    let guard = Guard::new(args.bind, args.allow_host.clone(), args.write).map_err(|error| {
        Error::new(Exit::Internal, "there are no random numbers for a token").cause(&error)
    })?;
    let token = guard.token().map(str::to_owned);
    let site = ServerState::open(&context.stores, args.write, guard).await?;
    let listener = listen(args).await?;
    let place = listener.local_addr()?;
    let address = address(place, token.as_deref());
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    output::print(&format!("{address}\n"))?;
    if !context.quiet {
        output::say(if args.write {
            "tags, notes and runs may be changed; Ctrl-C ends it"
        } else {
            "read-only; Ctrl-C ends it"
        });
        if args.bind.is_unspecified() {
            output::say(
                "from other machines: the same with this machine's address in place of `localhost` (its name needs \
                 --allow-host)",
            );
        }
    }
    if args.open {
        open(&address);
    }
    let stop = async {
        tokio::select! {
            _ = interrupted.recv() => {}
            _ = terminated.recv() => {}
        }
    };
    ui::serve(Arc::new(site), listener, stop).await;
    Ok(())
}

async fn listen(args: &Args) -> Result<TcpListener, Error> {
    let wanted = SocketAddr::new(args.bind, args.port.unwrap_or(PORT));
    let refused = |error: &std::io::Error| {
        let error_shown =
            Error::new(Exit::Internal, format!("cannot listen on {wanted}")).cause(error);
        match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                error_shown.hint("another program uses this port; --port 0 takes any free port")
            }
            std::io::ErrorKind::AddrNotAvailable => {
                error_shown.hint("--bind takes an address of this machine")
            }
            _ => error_shown,
        }
    };
    match TcpListener::bind(wanted).await {
        Err(error) if args.port.is_none() && error.kind() == std::io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::new(args.bind, 0))
                .await
                .map_err(|error| refused(&error))
        }
        bound => bound.map_err(|error| refused(&error)),
    }
}

/// The address to open: an unspecified one is replaced by localhost.
fn address(place: SocketAddr, token: Option<&str>) -> String {
    let host = match place.ip() {
        ip if ip.is_loopback() && ip.is_ipv4() => "localhost".to_owned(),
        ip if ip.is_unspecified() => "localhost".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    let token = token.map_or_else(String::new, |token| format!("?token={token}"));
    format!("http://{host}:{}/{token}", place.port())
}

/// Asks the desktop, or else `$BROWSER`, to open an address. If neither does, it says so; the address has already been
/// printed.
fn open(address: &str) {
    let chosen = std::env::var("BROWSER").unwrap_or_default();
    let chosen = chosen.split(':').next().unwrap_or_default().to_owned();
    let start = |program: &str| {
        std::process::Command::new(program)
            .arg(address)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
    };
    let unopened = |why: String| {
        output::say(&format!(
            "no browser could be opened ({why}): open the address above"
        ));
    };
    let (program, opened) = match start("xdg-open") {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !chosen.is_empty() => {
            let opened = start(&chosen);
            (chosen, opened)
        }
        opened => ("xdg-open".to_owned(), opened),
    };
    match opened {
        Ok(mut child) => {
            // The process may live as long as the browser.
            std::thread::spawn(move || match child.wait() {
                Ok(status) if !status.success() => unopened(format!("{program}: {status}")),
                _ => {}
            });
        }
        Err(error) => unopened(format!("{program}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_can_be_opened() {
        let check = |place: &str, token: Option<&str>, expected: &str| {
            assert_eq!(address(place.parse().unwrap(), token), expected);
        };
        check("127.0.0.1:6116", None, "http://localhost:6116/");
        check("0.0.0.0:80", Some("ab"), "http://localhost:80/?token=ab");
        check("10.0.0.7:80", Some("ab"), "http://10.0.0.7:80/?token=ab");
        check("[::1]:80", None, "http://[::1]:80/");
    }
}
