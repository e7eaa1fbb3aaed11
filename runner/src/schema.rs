//! The JSON schema of recipes: the runner's part and the stages of plugins.
