"""Results as text for people and as data for pipelines. The only user of Rich."""
