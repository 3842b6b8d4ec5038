"""Everything a run can be told: fields, defaults, YAML."""
