"""Do the directions matter? Cores alone between bases of every origin, heads frozen, compared pair by pair."""
