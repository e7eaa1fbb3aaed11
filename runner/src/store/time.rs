//! A moment, as the store keeps it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970-01-01 UTC, by the wall clock: for people and for ordering, never for measuring a duration
/// that matters. Serialises as RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub i64);

impl Time {
    /// The end of the year 9999, the last that is shown.
    pub const LAST: Self = Self(253_402_300_799_999);

    /// This moment if a clock can have shown it; otherwise the present moment.
    pub fn or_now(self) -> Self {
        match (0..=Self::LAST.0).contains(&self.0) {
            true => self,
            false => Self::now(),
        }
    }

    /// The present moment.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// Seconds from this moment to another; negative if that is earlier.
    pub fn seconds_to(self, other: Time) -> f64 {
        other.0.saturating_sub(self.0) as f64 / 1000.0
    }

    /// The time passed since an earlier moment; zero if it is not earlier.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A damaged store may hold any number; the formatter knows years up to 9999.
        let millis = u64::try_from(self.0.min(Self::LAST.0)).unwrap_or(0);
        let text = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(millis))
            .to_string();
        f.pad(&text)
    }
}

impl serde::Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
