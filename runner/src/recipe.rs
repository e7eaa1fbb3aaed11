//! Recipes as written: reading, `${}` interpolation, `--set`.
