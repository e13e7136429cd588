"""The run configuration: its schema, and reading it from YAML."""
