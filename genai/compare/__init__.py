"""Compare finished runs: `runs` reads them and decides which may be ranked, `page` makes the report."""
