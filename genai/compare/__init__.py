"""Finished runs side by side; see `runs` for what is read of them and when they may be ranked, `page` for the report."""
