//! Durations as people write them: `90s`, `2h 30m`.

use std::time::Duration;

/// The longest accepted duration: clocks overflow beyond some hundred years.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Parses a duration.
///
/// # Errors
/// It is invalid, or longer than ten years.
pub fn parse(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time > LONGEST => Err("it is longer than ten years".to_owned()),
        Ok(time) => Ok(time),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_an_end() {
        assert_eq!(parse("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("9y").map(|time| time.as_secs() / 86400), Ok(3287));
        for endless in ["11y", "300000000000y"] {
            assert!(parse(endless).is_err(), "{endless}");
        }
        assert!(parse("90").is_err());
    }
}
