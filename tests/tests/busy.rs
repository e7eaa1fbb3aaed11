//! A busy machine slows the candle plugin down by no more than the share of it that is lost.

use retort_candle::Candle;
use retort_tests::speed::busy;

#[test]
#[ignore = "measures times, half a minute: make test-long"]
fn a_busy_processor_costs_no_more_than_its_share() {
    busy::check(|threads| Candle::open("cpu", "f32", threads));
}
