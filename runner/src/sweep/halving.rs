//! Successive halving, asynchronously: ASHA (Li et al., "A System for Massively Parallel Hyperparameter Tuning",
//! arXiv 1810.05934, algorithm 2).
//!
//! In: what each point was judged by at the rungs that it has reached. Out: which point goes on next, and to which rung. A
//! point runs from rung to rung, and from the last one to the end of the run. It continues if it is among the best 1/eta of
//! those that have reached its rung so far; otherwise a new point begins. If nothing else is left and no point has run to its
//! end, the best point of the highest rung continues, so that the sweep has a result.

use std::collections::BTreeMap;

use super::Asha;

/// How far a point is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PointProgress {
    /// What it was judged by, rung by rung; NaN is the worst.
    pub rungs: Vec<f64>,
    /// Legs that it has begun, this one included.
    pub begun: usize,
    /// Whether its run has ended well.
    pub done: bool,
}

/// The points of a sweep under way.
#[derive(Debug, Clone)]
pub struct Halving {
    asha: Asha,
    courses: BTreeMap<u32, PointProgress>,
}

/// The next rung a point runs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextRung {
    /// The point.
    pub point: u32,
    /// 0 leads to the first rung; as many as there are rungs: to the end.
    pub number: usize,
}

impl Halving {
    /// Begins, or goes on, with what is known of each point.
    pub fn new(asha: Asha, courses: BTreeMap<u32, PointProgress>) -> Self {
        Self { asha, courses }
    }

    /// The step of a rung; none after the last, where a point runs to its end.
    pub fn target(&self, next: NextRung) -> Option<u64> {
        self.asha.rungs.get(next.number).copied()
    }

    /// A rung to run to now; none while there is none. `idle` says that no point is under way.
    pub fn next(&mut self, idle: bool) -> Option<NextRung> {
        let next = self.promotable().or_else(|| self.fresh());
        let next = next.or_else(|| idle.then(|| self.last_resort()).flatten())?;
        if let Some(course) = self.courses.get_mut(&next.point) {
            course.begun = next.number + 1;
        }
        Some(next)
    }

    /// A point has come to its rung, with this value.
    pub fn reached(&mut self, next: NextRung, value: f64) {
        if let Some(course) = self.courses.get_mut(&next.point) {
            course.rungs.truncate(next.number);
            course.rungs.push(value);
        }
    }

    /// A point's run has ended well.
    pub fn finished(&mut self, point: u32) {
        if let Some(course) = self.courses.get_mut(&point) {
            course.done = true;
        }
    }

    /// Points that have stopped at a rung for good, or for now.
    pub fn stopped(&self) -> usize {
        let courses = self.courses.values();
        courses
            .filter(|course| !course.done && !course.rungs.is_empty())
            .count()
    }

    fn promotable(&self) -> Option<NextRung> {
        let eta = self.asha.reduction_factor.max(2) as usize;
        (0..self.asha.rungs.len()).rev().find_map(|rung| {
            let ranked = self.ranked(rung);
            let best = &ranked[..ranked.len() / eta];
            best.iter().find_map(|&point| self.from(point, rung))
        })
    }

    fn fresh(&self) -> Option<NextRung> {
        let mut courses = self.courses.iter();
        courses
            .find(|(_, course)| course.begun == 0 && !course.done && course.rungs.is_empty())
            .map(|(&point, _)| NextRung { point, number: 0 })
    }

    fn last_resort(&self) -> Option<NextRung> {
        if self.courses.values().any(|course| course.done) {
            return None;
        }
        (0..self.asha.rungs.len()).rev().find_map(|rung| {
            let ranked = self.ranked(rung);
            ranked.iter().find_map(|&point| self.from(point, rung))
        })
    }

    /// The rung after one, if the point has not begun to run to it.
    fn from(&self, point: u32, rung: usize) -> Option<NextRung> {
        let course = self.courses.get(&point)?;
        (!course.done && course.begun <= rung + 1).then_some(NextRung {
            point,
            number: rung + 1,
        })
    }

    /// The points that have reached a rung, the best first.
    fn ranked(&self, rung: usize) -> Vec<u32> {
        let mut reached: Vec<(f64, u32)> = self
            .courses
            .iter()
            .filter_map(|(&point, course)| Some((*course.rungs.get(rung)?, point)))
            .collect();
        reached.sort_by(|one, other| {
            self.asha
                .goal
                .order(one.0, other.0)
                .then(one.1.cmp(&other.1))
        });
        reached.into_iter().map(|(_, point)| point).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::Goal;

    fn halving(points: u32, rungs: &[u64], goal: Goal) -> Halving {
        let asha = Asha {
            metric: "loss".into(),
            goal,
            rungs: rungs.to_vec(),
            reduction_factor: 2,
        };
        let courses = (1..=points).map(|point| (point, PointProgress::default()));
        Halving::new(asha, courses.collect())
    }

    /// Goes rung by rung, with these values at every one; in order, as `point:rung`.
    fn go(halving: &mut Halving, value: impl Fn(u32) -> f64) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(next) = halving.next(true) {
            order.push(format!("{}:{}", next.point, next.number));
            match halving.target(next) {
                Some(_) => halving.reached(next, value(next.point)),
                None => halving.finished(next.point),
            }
        }
        order
    }

    #[test]
    fn the_worse_half_stops_at_each_rung() {
        let mut four = halving(4, &[10, 20], Goal::Min);
        let order = go(&mut four, f64::from);
        assert_eq!(order, ["1:0", "2:0", "1:1", "3:0", "4:0", "2:1", "1:2"]);
        assert_eq!(four.stopped(), 3);
        let mut four = halving(4, &[10, 20], Goal::Max);
        let order = go(&mut four, f64::from);
        assert!(order.contains(&"4:2".to_owned()), "{order:?}");
        assert!(!order.contains(&"1:1".to_owned()), "{order:?}");
    }

    #[test]
    fn somebody_goes_the_whole_way() {
        let order = go(&mut halving(3, &[10, 20, 30], Goal::Min), f64::from);
        assert!(order.contains(&"1:3".to_owned()), "{order:?}");
        let order = go(&mut halving(1, &[10], Goal::Min), |_| f64::NAN);
        assert_eq!(order, ["1:0", "1:1"]);
    }

    #[test]
    fn what_is_no_number_is_the_worst() {
        let value = |point: u32| if point == 1 { f64::NAN } else { 5.0 };
        for goal in [Goal::Min, Goal::Max] {
            let order = go(&mut halving(2, &[10], goal), value);
            assert_eq!(order, ["1:0", "2:0", "2:1"]);
        }
    }

    #[test]
    fn it_goes_on_where_it_was() {
        let mut halving = halving(4, &[10, 20], Goal::Min);
        for (point, value) in [(1, 3.0), (2, 1.0)] {
            let course = halving.courses.get_mut(&point).unwrap();
            course.rungs = vec![value];
            // What was begun and did not get to its rung begins again.
            course.begun = 1;
        }
        assert_eq!(
            halving.next(true),
            Some(NextRung {
                point: 2,
                number: 1
            })
        );
        assert_eq!(
            halving.next(false),
            Some(NextRung {
                point: 3,
                number: 0
            })
        );
        assert_eq!(
            halving.next(false),
            Some(NextRung {
                point: 4,
                number: 0
            })
        );
        assert_eq!(halving.next(false), None);
    }
}
