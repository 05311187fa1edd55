"""The range of every key of every config: `kinds`, the `table` of them, and the `check` of a config."""
