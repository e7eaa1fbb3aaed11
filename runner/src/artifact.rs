//! Artifacts on disk: staging, hashing, moving to their place.
