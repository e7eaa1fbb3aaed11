//! The `retort` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    retort::cli::main()
}
