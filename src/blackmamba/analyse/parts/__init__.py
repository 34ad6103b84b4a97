"""The sections of a report, one file each: `plans(lab)` says what it trains, if it does."""
