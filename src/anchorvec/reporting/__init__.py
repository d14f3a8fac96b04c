"""Reports: what runs and comparisons left on disk, as one page with a verdict, charts and tables."""
