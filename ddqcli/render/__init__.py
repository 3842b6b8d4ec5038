"""Results as text for people and as data for pipelines; the only user of Rich."""
