//! A process's state, by Linux's `/proc/PID/stat`.

/// What the kernel says about a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessStat {
    /// The kernel's letter: `R` runs, `S` waits, `T` is stopped, `Z` is a zombie.
    pub state: char,
    /// The process that started it.
    pub parent: u32,
    /// Its processor time, in clock ticks.
    pub cpu_ticks: u64,
    /// When it started, in clock ticks since the machine did: with its number, this names it for good.
    pub started: u64,
}

impl ProcessStat {
    /// Reads it; None if there is no such process.
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The second field, the name in brackets, may have spaces and brackets itself.
    fn parse(text: &str) -> Option<Self> {
        let (_, after) = text.rsplit_once(')')?;
        let fields: Vec<&str> = after.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            cpu_ticks: number(11)? + number(12)?,
            started: number(19)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_have_brackets() {
        let text = "7 (a) S 9) R 3 7 7 0 -1 64 1 0 0 0 12 30 0 0 20 0 1 0 5171 10 2 18\n";
        let expected = ProcessStat {
            state: 'R',
            parent: 3,
            cpu_ticks: 42,
            started: 5171,
        };
        assert_eq!(ProcessStat::parse(text), Some(expected));
        assert_eq!(ProcessStat::parse(""), None);
        let own = ProcessStat::of(std::process::id()).expect("Linux");
        assert_eq!(own.parent, std::os::unix::process::parent_id());
    }
}
